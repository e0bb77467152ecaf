"""The exact search of a whole row, for the few rows that `thresholds` leaves open.

One read tells whether the K-th greatest equals an end of the row's bracket. If not, four more settle it, eight bits at a
time from the top: a histogram of those scores that agree with the bits known so far says in which of 256 bins the K-th
lies. The last read finds the last key taken among the equals.

C rows, W keys in the chunk's window, K = topk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blocks import Chunk
from .launch import launch
from .order import LEAST, order_of

TILE = 4096  # registers / spills / bytes of shared memory on sm_80: 112 / 0 / 1024, sm_90: 107, sm_100: 112, gfx942: 53
WARPS = 16  # a program alone with a long row: all the speed that one can have


def radix(
    logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int, tau: Tensor, cut: Tensor,
    still_open: Tensor,
) -> None:  # fmt: skip
    """Completes tau and cut, int32 [C], where still_open int32 [C] is not 0: there they hold the ends of a bracket, which
    may be wrong. logits [C,W], key_start, key_stop int32 [T]."""
    launch(
        _radix, (chunk.num_rows,), logits, key_start[chunk.rows], key_stop[chunk.rows], tau, cut, still_open,
        chunk.keys.start, chunk.width, topk, num_warps=WARPS, TILE=TILE,
    )  # fmt: skip


@triton.jit
def _orders(logits, at, start, stop, TILE: tl.constexpr):
    """The step of the row that begins at column `at` -> columns, which of them are visible, orders."""
    column = at + tl.arange(0, TILE)
    inside = (column >= start) & (column < stop)
    return column, inside, order_of(tl.load(logits + column, mask=inside, other=0.0))


@triton.jit
def _count(logits, first, start, stop, value, TILE: tl.constexpr):
    """-> how many orders of the row are above `value`, and how many equal it."""
    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for at in range(first, stop, TILE):
        _, inside, order = _orders(logits, at, start, stop, TILE)
        above += (inside & (order > value)).to(tl.int32)
        equal += (inside & (order == value)).to(tl.int32)
    return tl.sum(above), tl.sum(equal)


@triton.jit
def _search(logits, first, start, stop, rank, TILE: tl.constexpr):
    """-> the rank-th greatest order of the row, and its rank among the equals."""
    bins = tl.arange(0, 256)
    known = 0
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int32)
        for at in range(first, stop, TILE):
            _, inside, order = _orders(logits, at, start, stop, TILE)
            bits = order ^ LEAST  # as an unsigned number, of the same order
            if digit > 0:
                inside = inside & ((bits >> (shift + 8)) == (known >> (shift + 8)))
            histogram += tl.histogram((bits >> shift) & 255, 256, mask=inside)
        best = tl.max(tl.where(tl.cumsum(histogram, axis=0, reverse=True) >= rank, bins, 0))
        rank -= tl.sum(tl.where(bins > best, histogram, 0))
        known = known | (best << shift)
    return known ^ LEAST, rank


@triton.jit
def _last_taken(logits, first, start, stop, threshold, wanted, TILE: tl.constexpr):
    """-> the column of the wanted-th score that equals the threshold."""
    seen, reached, at = 0, 0, first - TILE
    while (seen + reached < wanted) & (at < stop):
        at += TILE
        seen += reached
        _, inside, order = _orders(logits, at, start, stop, TILE)
        reached = tl.sum((inside & (order == threshold)).to(tl.int32))
    column, inside, order = _orders(logits, at, start, stop, TILE)
    equal = inside & (order == threshold)
    place = seen + tl.cumsum(equal.to(tl.int32), axis=0)
    return tl.max(tl.where(equal & (place == wanted), column, -1))


@triton.jit
def _radix(logits, key_start, key_stop, tau, cut, still_open, first_key, width, topk, TILE: tl.constexpr):
    row = tl.program_id(0)
    if tl.load(still_open + row) != 0:
        start, stop = tl.load(key_start + row) - first_key, tl.load(key_stop + row) - first_key
        first = start // 16 * 16  # aligned: four scores a load
        logits += row.to(tl.int64) * width
        threshold = tl.load(tau + row)
        above, equal = _count(logits, first, start, stop, threshold, TILE)
        if (topk <= above) | (topk > above + equal):
            threshold = tl.load(cut + row)
            above, equal = _count(logits, first, start, stop, threshold, TILE)
        wanted = topk - above
        if (wanted < 1) | (wanted > equal):
            threshold, wanted = _search(logits, first, start, stop, topk, TILE)
        tl.store(tau + row, threshold)
        tl.store(cut + row, first_key + _last_taken(logits, first, start, stop, threshold, wanted, TILE))
