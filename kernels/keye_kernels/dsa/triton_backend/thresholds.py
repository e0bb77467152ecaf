"""Which keys of a row are the K greatest: a threshold and, among the keys that equal it, the last one taken.

Exact and deterministic whatever the scores are, and cheap on the usual ones:

1. A row short enough to be held in registers is searched there. A longer one is first sampled: two scores of the sample,
   five standard deviations to either side of the place where the K-th should be, bracket the threshold.
2. One read of the row counts what lies above the bracket and copies what lies inside it to a scratch.
3. If the counts prove the bracket and all of it was copied, the threshold is found among the copied. Else the row stays
   open, for `radix`: two more reads if the threshold is one of the bracket's ends (a plateau of equal scores is one), six
   in any other case.

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
from .order import GREATEST, INFINITY, LEAST, order_of, score_of
from .radix import radix

# _bracket with this many scores held, 8 warps: registers / spills, Triton 3.6. Shared memory is 32 bytes (gfx942: 8 KiB).
#                      sm_80     sm_90     sm_100    gfx942 (VGPR)
#   8192, whole rows   101 / 0    99 / 0    97 / 0    67 / 0
#   2048                79 / 0    74 / 0    63 / 0    60 / 0
#   4096                79 / 0    77 / 0    80 / 0    56 / 0
#   8192               127 / 0   128 / 0   128 / 0    68 / 0
# One step of the read is 256 instructions a warp for 8 scores a thread on sm_90: about 1.2 times what the memory allows.
HELD = 8192  # most scores that a program holds in registers at once
DEEP = 8  # scores that a thread reads in one step
WARPS = 8
SCRATCH = 2**24  # candidates of all rows of a launch: 128 MiB


def thresholds(logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int) -> tuple[Tensor, Tensor]:
    """logits [C,W], key_start, key_stop int32 [T] -> tau int32 [C], cut int32 [C].

    A row selects its visible keys s with order_of(score) > tau, or == tau and s <= cut: min(K, visible) of them, the
    greatest, equal scores to the lower s, NaN before everything.
    """
    tau, cut, still_open = bracket(logits, key_start, key_stop, chunk, topk)
    if chunk.width > room(chunk.width, topk):
        radix(logits, key_start, key_stop, chunk, topk, tau, cut, still_open)
    return tau, cut


def bracket(
    logits: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> tau, cut, still_open, each int32 [C]; where still_open is not 0, tau and cut are the ends of the bracket."""
    num_rows, width, held = chunk.num_rows, chunk.width, room(chunk.width, topk)
    key_start, key_stop = key_start[chunk.rows], key_stop[chunk.rows]
    result = torch.empty(3, num_rows, dtype=torch.int32, device=logits.device)
    step = max(SCRATCH // held, 1)
    scratch = result.new_empty(min(step, num_rows) * held if width > held else 0, dtype=torch.int64)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        launch(
            _bracket, (rows.stop - rows.start,), logits[rows], key_start[rows], key_stop[rows], scratch,
            *result[:, rows], chunk.keys.start, width, topk,
            num_warps=WARPS if held > 1024 else 4, HELD=held, WHOLE=width <= held, SAMPLE=sample_of(width),
            LANES=32 * WARPS, DEEP=DEEP,
        )  # fmt: skip
    tau, cut, still_open = result
    return tau, cut, still_open


def sample_of(width: int) -> int:
    """Scores of a row that place its bracket: more for very long rows, where the K-th would come among the first few."""
    return min(HELD, max(2048, triton.next_power_of_2(width) // 128))


def room(width: int, topk: int) -> int:
    """Scores of a row that are held at once: all if they fit, else what a bracket may hold, half more than expected."""
    if width <= HELD:
        return max(16, triton.next_power_of_2(width))
    expected = 10 * math.sqrt(topk * max(width - topk, 0) / sample_of(width))
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
def _last_taken(equal, column, wanted):
    """-> the wanted-th least of those columns, int32 [SIZE] in any order, that are marked as equal to the threshold."""
    last = tl.max(tl.where(equal, column, -1))
    if wanted < tl.sum(equal.to(tl.int32)):
        column = tl.where(equal, column, GREATEST)
        least = tl.min(column)
        while least < last:
            middle = (least + last) // 2
            enough = tl.sum((column <= middle).to(tl.int32)) >= wanted
            last = tl.where(enough, middle, last)
            least = tl.where(enough, least, middle + 1)
    return last


@triton.jit
def _search_short(logits, start, stop, topk, HELD: tl.constexpr):
    """A row of at most HELD visible scores -> threshold, last column taken."""
    column = start + tl.arange(0, HELD)
    score = tl.load(logits + column, mask=column < stop, other=0.0)
    order = tl.where(column < stop, order_of(score), LEAST)
    threshold = _kth_greatest(order, topk, HELD)
    return threshold, _last_taken(order == threshold, column, topk - tl.sum((order > threshold).to(tl.int32)))


@triton.jit
def _place_bracket(logits, start, count, topk, SAMPLE: tl.constexpr):
    """Two scores between which the row's topk-th greatest almost surely lies, as orders; the same sample every time."""
    number = tl.arange(0, SAMPLE)
    jitter = (number * 40503 >> 8) & 255  # one score from each of SAMPLE strides, but in step with no period
    place = (number * 256 + jitter).to(tl.int64) * count // (SAMPLE * 256)
    sample = order_of(tl.load(logits + start + place))
    share = topk / count
    slack = 5.0 * tl.sqrt(SAMPLE * share * (1.0 - share)) + 1.0
    upper = tl.floor(SAMPLE * share - slack).to(tl.int32)
    lower = tl.ceil(SAMPLE * share + slack).to(tl.int32)
    top = tl.full([], INFINITY, tl.int32)
    bottom = tl.full([], -INFINITY - 1, tl.int32)
    if upper >= 1:
        top = _kth_greatest(sample, upper, SAMPLE)
    if lower <= SAMPLE:
        bottom = _kth_greatest(sample, lower, SAMPLE)
    return top, bottom


@triton.jit
def _read(
    logits, start, stop, top, bottom, copied, HELD: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """Copies the bits and columns of the scores from bottom to top, as far as there is room, always in the same order.

    -> how many scores are above (NaN is), and how many inside; a bracket with an end at NaN holds nothing. A thread holds
    one row of a [LANES,DEEP] tile: it counts alone, and one scan over the lanes gives each its slots. Lanes come first
    because the layout that Triton picks for the scattered stores is then that of the loads.
    """
    above = tl.zeros([LANES], tl.int32)
    found = 0
    offset = tl.arange(0, LANES)[:, None] + LANES * tl.arange(0, DEEP)[None, :]
    for at in range(start, stop, DEEP * LANES):
        score = tl.load(logits + at + offset, mask=offset < stop - at, other=float("nan"))
        not_above = score <= top
        above += DEEP - tl.sum(not_above.to(tl.int32), axis=1)
        inside = (not_above & (score >= bottom)).to(tl.int32)
        mine = tl.sum(inside, axis=1)
        slot = found + tl.cumsum(mine, axis=0) - mine
        found += tl.sum(mine)
        if found <= HELD:
            pair = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (at + offset).to(tl.int64)
            tl.store(copied + slot[:, None] + tl.cumsum(inside, axis=1) - inside, pair, mask=inside != 0)
    past_the_end = tl.cdiv(stop - start, DEEP * LANES) * (DEEP * LANES) - (stop - start)
    return tl.sum(above) - past_the_end, found


@triton.jit
def _search_copied(copied, inside, rank, HELD: tl.constexpr):
    """What _read copied -> threshold, last column taken."""
    index = tl.arange(0, HELD)
    bits = (tl.load(copied + index, mask=index < inside, other=0) >> 32).to(tl.int32)
    order = tl.where(index < inside, order_of(bits.to(tl.float32, bitcast=True)), LEAST)
    threshold = _kth_greatest(order, rank, HELD)
    equal = order == threshold
    column = tl.load(copied + index, mask=equal, other=0).to(tl.int32)  # read again: held all along they cost registers
    return threshold, _last_taken(equal, column, rank - tl.sum((order > threshold).to(tl.int32)))


@triton.jit
def _bracket(
    logits, key_start, key_stop, scratch, tau, cut, still_open, first_key, width, topk, HELD: tl.constexpr,
    WHOLE: tl.constexpr, SAMPLE: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, stop = tl.load(key_start + row) - first_key, tl.load(key_stop + row) - first_key
    logits += row.to(tl.int64) * width
    threshold = tl.full([], LEAST, tl.int32)  # below every score: all are taken
    last = tl.full([], -1, tl.int32)
    unsure = tl.full([], 0, tl.int32)
    if stop - start > topk:
        if WHOLE:
            threshold, last = _search_short(logits, start, stop, topk, HELD)
        else:
            if stop - start <= HELD:
                threshold, last = _search_short(logits, start, stop, topk, HELD)
            else:
                copied = scratch + row * HELD
                top, bottom = _place_bracket(logits, start, stop - start, topk, SAMPLE)
                above, inside = _read(logits, start, stop, score_of(top), score_of(bottom), copied, HELD, LANES, DEEP)
                rank = topk - above  # of the K-th among what is not above the bracket
                if (rank >= 1) & (rank <= inside) & (inside <= HELD):
                    tl.debug_barrier()  # what one thread copied, others read
                    threshold, last = _search_copied(copied, inside, rank, HELD)
                else:
                    threshold, last = top, bottom - first_key
                    unsure = tl.full([], 1, tl.int32)
    tl.store(tau + row, threshold)
    tl.store(cut + row, last + first_key)
    tl.store(still_open + row, unsure)
