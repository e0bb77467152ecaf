"""Sums of the entries that share a key, in the entries' own order: what atomics add up in any order.

N entries, each with a key and a vector of V values; the keys lie in a window of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .views import power_of_two


@dataclass(frozen=True)
class Segments:
    """Entries sorted by key; entries of one key keep their order."""

    order: Tensor  # int64 [N]
    bounds: Tensor  # int32 [W + 1]: key first + i holds order[bounds[i] : bounds[i + 1]]
    first: int


def segments_of(keys: Tensor, window: slice) -> Segments:
    """int32 [N], all in the window -> their segments. No host sync."""
    ordered, order = torch.sort(keys, stable=True)
    probes = torch.arange(window.start, window.stop + 1, dtype=keys.dtype, device=keys.device)
    return Segments(order, torch.searchsorted(ordered, probes, out_int32=True), window.start)


@triton.jit
def sum_segments(values, order, bounds, target, first, width, V: tl.constexpr, KEYS: tl.constexpr, BV: tl.constexpr):
    """Grid (W / KEYS, V / BV): some keys and some columns each; their segments are walked side by side."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    low = tl.load(bounds + key, mask=key < width, other=0)
    size = tl.load(bounds + key + 1, mask=key < width, other=0) - low
    total = tl.zeros([KEYS, BV], tl.float32)
    for i in range(tl.max(size, 0)):
        entry = tl.load(order + low + i, mask=i < size, other=0)
        mask = (i < size)[:, None] & (column < V)[None, :]
        total += tl.load(values + entry[:, None] * V + column[None, :], mask=mask, other=0.0)
    place = target + (first + key).to(tl.int64)[:, None] * V + column[None, :]
    mask = (size > 0)[:, None] & (column < V)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


def add_segments(segments: Segments, values: Tensor, target: Tensor) -> None:
    """target[key] += the sum of its entries, added up in order; values float32 [N,...], target float32 [S,...]."""
    width, size = segments.bounds.numel() - 1, target[0].numel()
    columns = min(power_of_two(size), 512)
    launch(
        sum_segments, (-(-width // 4), -(-size // columns)), values, segments.order, segments.bounds, target,
        segments.first, width, V=size, KEYS=4, BV=columns,
    )  # fmt: skip
