"""mRoPE position ids: one counter per axis (time, height, width).

Text advances all three axes by one. A picture or frame stands at one time, and its rows and columns count from the same
base: t = base, h = base + row, w = base + column on the merged grid; base is one above the greatest position so far, and
the text after it goes on one above the greatest inside it. No absolute-time scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MERGE = 2  # patches per token, down and across


def mrope_positions(input_ids: Any, grids: Any, image_token_id: int, video_token_id: int) -> np.ndarray:
    """int64 [3, L] for one row of token ids [L] (array, list or tensor, on any device).

    `grids` holds patches per picture or frame, in token order: [N, 3] as (1, down, across), or [N, 2] as (down, across).
    Each takes down * across / 4 pad tokens. Raises ValueError when the tokens and the grids do not agree.
    """
    ids = _to_numpy(input_ids).astype(np.int64).reshape(-1)
    sizes = _merged_sizes(grids)
    position = np.empty((3, len(ids)), dtype=np.int64)
    starts = np.flatnonzero((ids == image_token_id) | (ids == video_token_id))
    done = 0  # tokens with a position
    base = 0  # the next free position
    seen = 0  # pad tokens consumed
    for number, (rows, columns) in enumerate(sizes):
        count = rows * columns
        if seen + count > len(starts):
            raise ValueError(
                f"{len(sizes)} grids want {sum(r * c for r, c in sizes)} image or video tokens, the row has {len(starts)}"
            )
        begin, end = int(starts[seen]), int(starts[seen]) + count
        if int(starts[seen + count - 1]) != end - 1 or (ids[begin:end] != ids[begin]).any():
            raise ValueError(f"picture or frame {number} wants {count} tokens of one kind in a row from token {begin}")
        base = _text(position, done, begin, base)
        position[0, begin:end] = base
        position[1, begin:end] = base + np.repeat(np.arange(rows), columns)
        position[2, begin:end] = base + np.tile(np.arange(columns), rows)
        base += max(rows, columns)
        done, seen = end, seen + count
    if seen != len(starts):
        raise ValueError(f"the row has {len(starts)} image or video tokens, the {len(sizes)} grids cover {seen}")
    _text(position, done, len(ids), base)
    return position


def _text(position: np.ndarray, begin: int, end: int, base: int) -> int:
    """Writes positions base, base + 1, ... to the text tokens begin..end; returns the next free position."""
    position[:, begin:end] = np.arange(base, base + end - begin)
    return base + end - begin


def _merged_sizes(grids: Any) -> list[tuple[int, int]]:
    """(rows, columns) in tokens, per picture or frame."""
    array = _to_numpy(grids).astype(np.int64) if grids is not None else np.zeros((0, 3), dtype=np.int64)
    if array.size == 0:
        return []
    if array.ndim != 2 or array.shape[1] not in (2, 3):
        raise ValueError(f"grids must be [N, 2] or [N, 3], not {list(array.shape)}")
    if array.shape[1] == 3 and (array[:, 0] != 1).any():
        raise ValueError("grids must have t = 1: every frame is a picture of its own, with its own tokens")
    if (array[:, -2:] % MERGE).any() or (array[:, -2:] <= 0).any():
        raise ValueError(f"grids must be positive multiples of {MERGE} patches down and across")
    return [(int(h) // MERGE, int(w) // MERGE) for h, w in array[:, -2:]]


def _to_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
