"""What passes between processor, packing, loader and trainer.

Shapes: L tokens of one sample, B packed rows of S tokens, P patches of 14 x 14 pixels, N pictures and frames.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from keye_data.accounting import Skipped

if TYPE_CHECKING:  # the model takes batches where there is no PyAV
    from keye_data.video import Part

IGNORE = -100


def pixel_values(patches: torch.Tensor) -> torch.Tensor:
    """Pixels as the encoder takes them, uint8 -> fp32 in -1..1: 1/255, mean = std = 0.5."""
    return patches.to(torch.float32) / 127.5 - 1.0


@dataclass
class Media:
    """One picture, or the chosen frames of one clip, still encoded."""

    kind: str  # "image" | "video"
    parts: list[Part]  # where its frames lie, in the order of their tokens; a picture has one part with frame 0
    size: tuple[int, int]  # (height, width) in pixels to resize to, multiples of 28

    @property
    def n_frames(self) -> int:
        return sum(len(part.frames) for part in self.parts)

    @property
    def tokens_per_frame(self) -> int:
        return (self.size[0] // 28) * (self.size[1] // 28)


@dataclass
class EncodedSample:
    key: str  # names the sample in logs: shard and key
    source: str
    input_ids: np.ndarray  # int64 [L]
    labels: np.ndarray  # int64 [L], aligned with input_ids, IGNORE where nothing is to be predicted
    position_ids: np.ndarray  # int64 [3, L]
    media: list[Media] = field(default_factory=list)  # in the order of their tokens

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Batch:
    """One micro-batch, decoded. Key ranges count within a row: token t sees key_start[t] <= s < key_stop[t]."""

    input_ids: torch.Tensor  # int64 [B, S]
    targets: torch.Tensor  # int64 [B, S]: the next token, IGNORE where none; never across documents
    position_ids: torch.Tensor  # int64 [3, B, S]
    key_start: torch.Tensor  # int32 [B, S]
    key_stop: torch.Tensor  # int32 [B, S]; equal to key_start on padding
    patches: torch.Tensor  # uint8 [P, 3, 14, 14], raster order inside a frame, frames in token order
    grid: torch.Tensor  # int64 [N, 2]: patches down and across, per picture or frame
    keys: list[str] = field(default_factory=list)  # the samples inside
    sources: list[str] = field(default_factory=list)  # the source of each
    bad: list[Skipped] = field(
        default_factory=list
    )  # samples skipped since the last batch, and masked ones of this one
    decode_ms: float = 0.0

    @property
    def skipped(self) -> dict[str, int]:
        """`bad`, counted: reason -> samples."""
        return dict(Counter(one.reason for one in self.bad))
