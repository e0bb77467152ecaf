"""Cutting the queries into chunks, each with the slice of keys that it looks at.

The boundaries follow from the ranges alone, never from the number of heads: tensor-parallel ranks cut alike, so a
collective inside a chunk meets its partners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -1e30  # finite: a row that sees nothing stays free of NaN, and exp(MASKED) is an exact 0
PAIRS_PER_CHUNK = 2**19  # query-key pairs in a chunk: one head's fp32 logits take 2 MiB
ROWS = (16, 256)  # least and most queries in a chunk


@dataclass
class Chunk:
    """Rows of the queries and the keys that they look at; C rows, N keys."""

    rows: slice
    keys: slice
    start: Tensor | None = None  # [C,1], relative to keys.start
    stop: Tensor | None = None
    indices: Tensor | None = None  # int32 [C,K], absolute

    def visible(self) -> Tensor:
        """bool [C,N]."""
        assert self.start is not None and self.stop is not None
        s = torch.arange(self.keys.stop - self.keys.start, dtype=torch.int32, device=self.start.device)
        return (s >= self.start) & (s < self.stop)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[C,N]: 0 where a key counts, MASKED elsewhere; from the indices if there are some, else from the ranges."""
        if self.indices is None:
            return bias_of(self.visible(), dtype)
        num_keys = self.keys.stop - self.keys.start
        slots = torch.where(self.indices < 0, num_keys, self.indices - self.keys.start).long()
        bias = torch.full((slots.shape[0], num_keys + 1), MASKED, dtype=dtype, device=slots.device)
        return bias.scatter_(1, slots, 0.0)[:, :num_keys]

    def has_key(self) -> Tensor:
        """bool [C]: rows that see anything at all."""
        if self.indices is not None:
            return (self.indices >= 0).any(-1)
        assert self.start is not None and self.stop is not None
        return (self.start < self.stop)[:, 0]


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool -> 0 where true, MASKED where false."""
    return mask.to(dtype).sub_(1).mul_(-MASKED)


def _row_slices(num_queries: int, widest: int) -> list[slice]:
    rows = min(max(PAIRS_PER_CHUNK // max(widest, 1), ROWS[0]), ROWS[1])
    return [slice(at, min(at + rows, num_queries)) for at in range(0, num_queries, rows)]


def chunks_of_ranges(key_start: Tensor, key_stop: Tensor) -> Iterator[Chunk]:
    """Chunks over contiguous ranges; rows that see no key are left out when their whole chunk sees none."""
    if key_start.numel() == 0:
        return
    for rows in _row_slices(len(key_start), int((key_stop - key_start).max())):
        start, stop = key_start[rows, None], key_stop[rows, None]
        filled = start < stop
        if filled.any():
            low, high = int(start[filled].min()), int(stop[filled].max())
            yield Chunk(rows, slice(low, high), start - low, stop - low)


def chunks_of_indices(indices: Tensor) -> Iterator[Chunk]:
    """Chunks over listed keys, int32 [T,K] padded with -1."""
    if indices.numel() == 0:
        return
    for rows in _row_slices(len(indices), int(indices.max()) + 1):
        listed = indices[rows]
        filled = listed[listed >= 0]
        if filled.numel():
            yield Chunk(rows, slice(int(filled.min()), int(filled.max()) + 1), indices=listed)
