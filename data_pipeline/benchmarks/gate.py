"""Is it the right frame? Compares what a decoder returned with the clip read plainly from its start by PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

NEIGHBOURS = 2


class WrongFrames(Exception):
    """A decoder returned other frames than it was asked for: it is not timed."""


def in_order(clip: Path) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of every frame: no seeking, no packet table, nothing of the code that is measured."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            yield frame.reformat(format="rgb24", threads=1).to_ndarray()


def check(clip: Path, frames: np.ndarray, indices: Sequence[int], tolerance: float) -> float:
    """Largest mean difference (of 255) between `frames` (uint8 [F, H, W, 3]) and frames `indices` (ascending) of the clip.

    WrongFrames if one differs by more than `tolerance`, or if another frame near it fits it better.
    """
    if len(frames) != len(indices):
        raise WrongFrames(f"{clip.name}: {len(frames)} frames for {len(indices)} asked for")
    errors: list[dict[int, float]] = [{} for _ in indices]
    waiting = list(range(len(indices)))
    for number, picture in enumerate(in_order(clip)):
        near = [k for k in waiting if abs(indices[k] - number) <= NEIGHBOURS]
        if near:
            seen = picture.astype(np.int16)
            for k in near:
                errors[k][number] = float(np.abs(frames[k].astype(np.int16) - seen).mean())
        waiting = [k for k in waiting if indices[k] + NEIGHBOURS > number]
        if not waiting:
            break
    worst = 0.0
    for index, found in zip(indices, errors):
        if index not in found:
            raise WrongFrames(f"{clip.name}: has no frame {index}")
        best = min(found, key=lambda number: (found[number], number != index))
        if found[index] > tolerance or best != index:
            raise WrongFrames(
                f"{clip.name}: asked for frame {index}, what came differs by {found[index]:.2f}; "
                f"frame {best} is nearest ({found[best]:.2f})"
            )
        worst = max(worst, found[index])
    return worst
