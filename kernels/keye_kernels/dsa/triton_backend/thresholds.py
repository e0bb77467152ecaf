"""Which keys of a row are the K greatest: a threshold and, among the keys that equal it, the last one taken.

Exact and deterministic whatever the scores are, and cheap on the usual ones:

1. A row short enough to be held in registers is searched there. A longer one is first sampled: two scores of the sample,
   four standard deviations to either side of the place where the K-th should be, bracket the threshold.
2. One read of the row counts what lies above the bracket and copies what lies inside it, in order, to a scratch.
3. If the counts prove the bracket, the threshold is found among the copied. If it is one of the bracket's two ends (a
   plateau of equal scores is one), only the last key taken is missing: a second read finds it, in `radix`. Any other
   row is searched there as a whole, in five reads.

C rows, W keys in the chunk's window, K = topk.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Chunk
from .launch import launch
from .order import GREATEST, LEAST, order_of
from .radix import NOT_FOUND, radix

SAMPLE = 2048  # scores of a row that place its bracket
HELD = 8192  # most scores that a program holds in registers at once
DEEP = 16  # scores that a thread reads in one step
SCRATCH = 2**24  # candidates of all rows of a launch: 128 MiB
WARPS = 8


def thresholds(logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int) -> tuple[Tensor, Tensor]:
    """logits [C,W], key_start, key_stop int32 [T] -> tau int32 [C], cut int32 [C].

    A row selects its visible keys s with order_of(score) > tau, or == tau and s <= cut: min(K, visible) of them, the
    greatest, equal scores to the lower s, NaN before everything.
    """
    tau, cut, missing = bracket(logits, key_start, key_stop, chunk, topk)
    if chunk.width > room(chunk.width, topk):
        radix(logits, key_start, key_stop, chunk, topk, tau, cut, missing)
    return tau, cut


def bracket(
    logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> tau, cut, missing, each int32 [C]. missing is 0 where tau and cut are final, and as `radix` wants it elsewhere."""
    num_rows, width, held = chunk.num_rows, chunk.width, room(chunk.width, topk)
    key_start, key_stop = key_start[chunk.rows], key_stop[chunk.rows]
    result = torch.empty(3, num_rows, dtype=torch.int32, device=logits.device)
    step = max(SCRATCH // held, 1)
    scratch = result.new_empty(min(step, num_rows) * 2 * held if width > held else 0)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        launch(
            _bracket, (rows.stop - rows.start,), logits[rows], key_start[rows], key_stop[rows], scratch,
            *result[:, rows], chunk.keys.start, width, topk,
            num_warps=WARPS if held > 1024 else 4, HELD=held, WHOLE=width <= held, SAMPLE=SAMPLE, LANES=32 * WARPS, DEEP=DEEP,
        )  # fmt: skip
    tau, cut, missing = result
    return tau, cut, missing


def room(width: int, topk: int) -> int:
    """Scores of a row that are held at once: all if they fit, else what a bracket may hold, half more than expected."""
    if width <= HELD:
        return max(16, triton.next_power_of_2(width))
    expected = 8 * math.sqrt(topk * max(width - topk, 0) / SAMPLE)
    return min(HELD, max(256, triton.next_power_of_2(int(1.5 * expected))))


@triton.jit
def _kth_greatest(order, rank, SIZE: tl.constexpr):
    """The rank-th greatest of int32 [SIZE], bit by bit from the top; rank >= 1, and at least that many are above LEAST."""
    value = tl.full([], LEAST, tl.int32)
    count = tl.full([], SIZE + 1, tl.int32)
    bit = 31
    while (bit >= 0) & (count != rank):
        trial = value ^ (1 << bit)
        reached = tl.sum((order >= trial).to(tl.int32))
        value = tl.where(reached >= rank, trial, value)
        count = tl.where(reached >= rank, reached, count)
        bit -= 1
    return tl.min(tl.where(order >= value, order, GREATEST))


@triton.jit
def _settle(order, column, rank, SIZE: tl.constexpr):
    """order, column int32 [SIZE] -> the rank-th greatest order, and its column where equals rank by column."""
    threshold = _kth_greatest(order, rank, SIZE)
    equal = order == threshold
    wanted = rank - tl.sum((order > threshold).to(tl.int32))
    last = tl.max(tl.where(equal, column, -1))
    if wanted < tl.sum(equal.to(tl.int32)):
        last = -1 - _kth_greatest(tl.where(equal, -1 - column, LEAST), wanted, SIZE)
    return threshold, last


@triton.jit
def _search_short(logits, start, stop, topk, HELD: tl.constexpr):
    """A row of at most HELD visible scores -> threshold, last column taken."""
    column = start + tl.arange(0, HELD)
    score = tl.load(logits + column, mask=column < stop, other=0.0)
    return _settle(tl.where(column < stop, order_of(score), LEAST), column, topk, HELD)


@triton.jit
def _place_bracket(logits, start, count, topk, SAMPLE: tl.constexpr):
    """Two scores of the row between which its topk-th greatest almost surely lies; the same sample every time."""
    number = tl.arange(0, SAMPLE)
    jitter = (number * 40503 >> 8) & 255  # one score from each of SAMPLE strides, but in step with no period
    place = (number * 256 + jitter).to(tl.int64) * count // (SAMPLE * 256)
    sample = order_of(tl.load(logits + start + place))
    share = topk / count
    slack = 4.0 * tl.sqrt(SAMPLE * share * (1.0 - share)) + 1.0
    upper = tl.floor(SAMPLE * share - slack).to(tl.int32)
    lower = tl.ceil(SAMPLE * share + slack).to(tl.int32)
    top = tl.full([], GREATEST, tl.int32)
    bottom = tl.full([], LEAST, tl.int32)
    if upper >= 1:
        top = _kth_greatest(sample, upper, SAMPLE)
    if lower <= SAMPLE:
        bottom = _kth_greatest(sample, lower, SAMPLE)
    return top, bottom


@triton.jit
def _read(logits, start, stop, top, bottom, copied, HELD: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr):
    """Copies (order, column) of the scores strictly inside the bracket, as far as there is room, always in one order.

    -> how many are above it, equal to its top, inside, equal to its bottom. A thread holds one column of a [DEEP,LANES]
    tile: it counts alone, and one scan over the lanes gives each its slots.
    """
    above = tl.zeros([LANES], tl.int32)
    at_top = tl.zeros([LANES], tl.int32)
    at_bottom = tl.zeros([LANES], tl.int32)
    found = 0
    offset = tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for at in range(start - start % 32, stop, DEEP * LANES):
        column = at + offset
        visible = (column >= start) & (column < stop)
        order = tl.where(visible, order_of(tl.load(logits + column, mask=visible, other=0.0)), LEAST)
        above += tl.sum((order > top).to(tl.int32), axis=0)
        at_top += tl.sum((order == top).to(tl.int32), axis=0)
        at_bottom += tl.sum((order == bottom).to(tl.int32), axis=0)
        inside = ((order < top) & (order > bottom)).to(tl.int32)
        mine = tl.sum(inside, axis=0)
        first = found + tl.cumsum(mine, axis=0) - mine
        slot = first[None, :] + tl.cumsum(inside, axis=0) - inside
        keep = (inside != 0) & (slot < HELD)
        tl.store(copied + slot, order, mask=keep)
        tl.store(copied + HELD + slot, column, mask=keep)
        found += tl.sum(mine)
    return tl.sum(above), tl.sum(at_top), found, tl.where((bottom > LEAST) & (bottom < top), tl.sum(at_bottom), 0)


@triton.jit
def _bracket(
    logits, key_start, key_stop, scratch, tau, cut, missing, first_key, width, topk,
    HELD: tl.constexpr, WHOLE: tl.constexpr, SAMPLE: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, stop = tl.load(key_start + row) - first_key, tl.load(key_stop + row) - first_key
    logits += row.to(tl.int64) * width
    threshold = tl.full([], LEAST, tl.int32)  # below every score: all are taken
    last = tl.full([], -1, tl.int32)
    wanted = tl.full([], 0, tl.int32)
    if stop - start > topk:
        if WHOLE:
            threshold, last = _search_short(logits, start, stop, topk, HELD)
        else:
            if stop - start <= HELD:
                threshold, last = _search_short(logits, start, stop, topk, HELD)
            else:
                copied = scratch + row * (2 * HELD)
                top, bottom = _place_bracket(logits, start, stop - start, topk, SAMPLE)
                above, at_top, inside, at_bottom = _read(logits, start, stop, top, bottom, copied, HELD, LANES, DEEP)
                rank = topk - above  # of the K-th among what is not above the bracket
                wanted = tl.full([], NOT_FOUND, tl.int32)
                if (rank >= 1) & (rank <= at_top):
                    threshold, wanted = top, rank
                else:
                    rank -= at_top
                    if (rank >= 1) & (rank <= inside) & (inside <= HELD):
                        tl.debug_barrier()  # what one thread copied, others read
                        index = tl.arange(0, HELD)
                        order = tl.load(copied + index, mask=index < inside, other=LEAST)
                        column = tl.load(copied + HELD + index, mask=index < inside, other=-1)
                        threshold, last = _settle(order, column, rank, HELD)
                        wanted = tl.full([], 0, tl.int32)
                    elif (rank > inside) & (rank <= inside + at_bottom):
                        threshold, wanted = bottom, rank - inside
    tl.store(tau + row, threshold)
    tl.store(cut + row, last + first_key)
    tl.store(missing + row, wanted)
