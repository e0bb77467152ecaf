"""How far the indexer's softmax is from what attention looks at, row by row.

T queries, S keys; N union entries; C rows and W keys of a chunk. p and logits are laid out as `teacher` and `scores` make them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blocks import BLOCK, Chunk, Union
from .launch import launch

# A thread holds the running sums of 8 places. sm_90, Triton 3.6: union 144 registers, range 107, no spills, 18 KiB.
UNION_TILE = dict(ROWS=8, TILE=128, num_warps=4)  # 8 rows of an entry of p are one 32-byte sector
RANGE_TILE = dict(ROWS=4, TILE=256, num_warps=4)


def divergence(
    p: Tensor, logits: Tensor, heads: int, key_start: Tensor, key_stop: Tensor, windows: Tensor, chunk: Chunk, kl: Tensor,
    student_lse: Tensor, union: Union | None = None,
) -> None:  # fmt: skip
    """Fills the chunk's rows of kl and student_lse, float32 [T].

    With teacher = p / heads and student = softmax(logits), both over the keys that the row looks at:
    kl = sum teacher * (log teacher - log student), student_lse = log sum exp(logits). A row that looks at nothing gets 0, 0.
    p float32 [N,16] with a union, [C,W] without; logits float32 [C,W]; heads is how many heads p sums over, on all ranks.
    """
    tile = RANGE_TILE if union is None else UNION_TILE
    launch(
        _divergence, (chunk.num_blocks, BLOCK // tile["ROWS"]), p, logits, kl, student_lse, key_start, key_stop, windows,
        *((None,) * 3 if union is None else (union.start, union.keys, union.words)),
        1 / heads, chunk.rows.start, chunk.rows.stop, chunk.keys.start, chunk.width, windows.shape[1],
        UNION=union is not None, **tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["last_row", "first_key", "num_windows"])
def _divergence(
    p, logits, kl, student_lse, key_start, key_stop, windows, union_start, union_keys, union_words,
    share, first_row, last_row, first_key, width, num_windows,
    UNION: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (block, part): ROWS of its 16 queries. Each place [TILE,ROWS] keeps running sums of its own, so that threads
    meet once, at the end. They are relative to the greatest logit so far: scores of any size cancel before they are summed."""
    block = tl.program_id(0)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = first_row + block * 16 + query
    live = row < last_row
    if UNION:
        begin = tl.load(union_start + block)
        end = tl.load(union_start + block + 1)
    else:
        start = tl.load(key_start + row, mask=live, other=0)
        stop = tl.load(key_stop + row, mask=live, other=0)
        begin = tl.load(windows + first_row // 16 + block)
        end = tl.load(windows + num_windows + first_row // 16 + block)
    in_logits = block.to(tl.int64) * 16 * width + query[None, :].to(tl.int64) * width - first_key
    peak = tl.full([TILE, ROWS], -3.0e38, tl.float32)  # finite: what has seen no key subtracts it without a NaN
    mass = tl.zeros([TILE, ROWS], tl.float32)  # sum of exp(logit - peak)
    weight = tl.zeros([TILE, ROWS], tl.float32)  # sum of teacher
    excess = tl.zeros([TILE, ROWS], tl.float32)  # sum of teacher * (log teacher - (logit - peak))
    for tile in tl.range(begin, end, TILE, num_stages=3):
        entry = tile + tl.arange(0, TILE)
        inside = entry < end
        if UNION:
            key = tl.load(union_keys + entry, mask=inside, other=0)
            word = tl.load(union_words + entry, mask=inside, other=0).to(tl.int32)
            looks = ((word[:, None] >> query[None, :]) & 1) != 0
            at = p + entry.to(tl.int64)[:, None] * 16 + query[None, :]
        else:
            key = entry
            looks = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
            at = p + in_logits + key[:, None]
        teacher = tl.load(at, mask=looks, other=0.0) * share
        logit = tl.load(logits + in_logits + key[:, None], mask=looks, other=float("-inf"))
        new_peak = tl.maximum(peak, logit)
        mass = mass * tl.exp(peak - new_peak) + tl.exp(logit - new_peak)
        log_teacher = tl.log(tl.where(teacher > 0, teacher, 1.0))
        below = tl.where(looks, logit - new_peak, 0.0)
        excess += weight * (new_peak - peak) + teacher * (log_teacher - below)
        weight += teacher
        peak = new_peak
    greatest = tl.max(peak, 0)
    rise = greatest[None, :] - peak
    mass = tl.sum(mass * tl.exp(-rise), 0)
    seen = mass != 0
    log_mass = tl.log(tl.where(seen, mass, 1.0))
    loss = tl.sum(excess + weight * rise, 0) + tl.sum(weight, 0) * log_mass
    tl.store(kl + row, tl.where(seen, loss, 0.0), mask=live)
    tl.store(student_lse + row, tl.where(seen, greatest + log_mass, 0.0), mask=live)
