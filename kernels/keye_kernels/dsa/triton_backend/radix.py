"""The exact search of a whole row, for the few rows that `thresholds` could not bracket.

Four reads settle the threshold, eight bits at a time from the top: a histogram of those scores that agree with the bits
known so far says in which of 256 bins the K-th greatest lies. One more read finds the last key taken among the equals.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blocks import Chunk
from .launch import launch
from .order import LEAST, order_of

NOT_FOUND = tl.constexpr(-1)
TILE = 4096  # registers / spills / bytes of shared memory on sm_90: FIGURES
WARPS = 8


def radix(
    logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int, tau: Tensor, cut: Tensor,
    missing: Tensor,
) -> None:  # fmt: skip
    """Completes tau and cut, int32 [C], of the rows with missing != 0: NOT_FOUND, or n when tau is known and cut is the
    n-th key that equals it. logits [C,W], key_start, key_stop int32 [T]."""
    launch(
        _radix, (chunk.num_rows,), logits, key_start[chunk.rows], key_stop[chunk.rows], tau, cut, missing,
        chunk.keys.start, chunk.width, topk, num_warps=WARPS, TILE=TILE,
    )  # fmt: skip


@triton.jit
def _radix(logits, key_start, key_stop, tau, cut, missing, first_key, width, topk, TILE: tl.constexpr):
    row = tl.program_id(0)
    wanted = tl.load(missing + row)
    if wanted != 0:
        start, stop = tl.load(key_start + row) - first_key, tl.load(key_stop + row) - first_key
        first = start // 16 * 16  # aligned: four scores a load
        logits += row.to(tl.int64) * width
        threshold = tl.load(tau + row)
        if wanted == NOT_FOUND:
            wanted = tl.cast(topk, tl.int32)
            bins = tl.arange(0, 256)
            known = 0
            for digit in tl.static_range(4):
                shift = 24 - 8 * digit
                histogram = tl.zeros([256], tl.int32)
                for at in range(first, stop, TILE):
                    column = at + tl.arange(0, TILE)
                    inside = (column >= start) & (column < stop)
                    order = order_of(tl.load(logits + column, mask=inside, other=0.0)) ^ LEAST  # unsigned, as bits
                    if digit > 0:
                        inside = inside & ((order >> (shift + 8)) == (known >> (shift + 8)))
                    histogram += tl.histogram((order >> shift) & 255, 256, mask=inside)
                reached = tl.cumsum(histogram, axis=0, reverse=True) >= wanted
                best = tl.max(tl.where(reached, bins, 0))
                wanted -= tl.sum(tl.where(bins > best, histogram, 0))
                known = known | (best << shift)
            threshold = known ^ LEAST
        seen, reached, at = 0, 0, first - TILE
        while (seen + reached < wanted) & (at < stop):
            at += TILE
            seen += reached
            column = at + tl.arange(0, TILE)
            inside = (column >= start) & (column < stop)
            order = order_of(tl.load(logits + column, mask=inside, other=0.0))
            reached = tl.sum((inside & (order == threshold)).to(tl.int32))
        column = at + tl.arange(0, TILE)
        inside = (column >= start) & (column < stop)
        equal = inside & (order_of(tl.load(logits + column, mask=inside, other=0.0)) == threshold)
        place = seen + tl.cumsum(equal.to(tl.int32), axis=0)
        tl.store(tau + row, threshold)
        tl.store(cut + row, first_key + tl.max(tl.where(equal & (place == wanted), column, -1)))
