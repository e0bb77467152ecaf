"""What attention looks at, summed over heads: the distribution that the indexer learns.

T queries, S keys, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim; N union entries; C rows and W keys of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import BLOCK, Chunk, Union
from .launch import launch


@dataclass(frozen=True)
class Tiles:
    heads: int  # of one KV head, in a dot: 16 * heads columns
    keys: int  # a dot's rows
    segment: int  # keys of one program: its queries are loaded once per KV head for all of them
    num_warps: int
    num_stages: int


# Hq 32, Hkv 4, D 128, bf16, Triton 3.6. Registers / spills / bytes of shared memory:
#          sm_80              sm_90 (wgmma)      sm_100 (tcgen05)   gfx942 (VGPR)
#   union  232 / 0 / 57344    160 / 0 / 69632    254 / 0 / 66576    244 / 0
#   range  250 / 0 / 57344    198 / 0 / 67584    254 / 0 / 67600    252 / 0
# Three programs (range: two) share an sm_90 processor. 128 keys with 8 warps take 178 registers: one; 3 stages 218: two.
HALF = Tiles(heads=8, keys=64, segment=1024, num_warps=4, num_stages=2)
FULL = Tiles(heads=2, keys=32, segment=256, num_warps=4, num_stages=1)


def teacher(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, key_start: Tensor, key_stop: Tensor, windows: Tensor, chunk: Chunk,
    union: Union | None = None,
) -> Tensor:  # fmt: skip
    """Sum over the heads of q of exp(scale * q . k - lse), 0 where a query does not look.

    q [T,Hq,D], k [S,Hkv,D], lse float32 [T,Hq] (natural log), key_start and key_stop int32 [T], windows of block_windows.
    With a union: float32 [N,16], entry by entry, its block's queries side by side; without: float32 [C,W] over the whole
    ranges, column = key - chunk.keys.start, defined inside each block's own window.
    """
    (_, num_heads, dim), num_groups = q.shape, k.shape[1]
    tiles = FULL if q.dtype == torch.float32 else HALF
    shape = (chunk.num_rows, chunk.width) if union is None else (len(union.keys), BLOCK)
    p = q.new_empty(shape, dtype=torch.float32)
    longest = chunk.width if union is None else union.widest
    launch(
        _teacher,
        (chunk.num_blocks, triton.cdiv(longest, tiles.segment)),
        q, k, lse, p, key_start, key_stop, windows,
        *((None,) * 3 if union is None else (union.start, union.keys, union.words)),
        scale * math.log2(math.e), chunk.rows.start, chunk.rows.stop, chunk.keys.start, chunk.width, windows.shape[1],
        UNION=union is not None, HQ=num_heads, HKV=num_groups, D=dim, DP=max(triton.next_power_of_2(dim), 16),
        HEADS=min(triton.next_power_of_2(num_heads // num_groups), tiles.heads),
        TILE=tiles.keys, SEGMENT=tiles.segment, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return p


@triton.jit(do_not_specialize=["last_row", "first_key", "num_windows"])
def _teacher(
    q, k, lse, p, key_start, key_stop, windows, union_start, union_keys, union_words,
    scale, first_row, last_row, first_key, width, num_windows,
    UNION: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program (block, segment): 16 queries, SEGMENT of their keys, every head. scale carries log2(e).

    The rows of a dot are keys and its columns (head, query), head first: the sum over heads stays inside a thread. The sum
    over KV heads grows in p, since a gathered tile of p is half as wide as one of k, and a reload of the queries twice.
    """
    GROUP: tl.constexpr = HQ // HKV
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    block = tl.program_id(0)
    query = tl.arange(0, 16)
    live = first_row + block * 16 + query < last_row
    if UNION:
        begin = tl.load(union_start + block)
        end = tl.load(union_start + block + 1)
    else:
        begin = tl.load(windows + first_row // 16 + block)
        end = tl.load(windows + num_windows + first_row // 16 + block)
        start = tl.load(key_start + first_row + block * 16 + query, mask=live, other=0)
        stop = tl.load(key_stop + first_row + block * 16 + query, mask=live, other=0)
    begin += tl.program_id(1) * SEGMENT
    end = tl.minimum(end, begin + SEGMENT)
    if begin >= end:
        return
    dim = tl.arange(0, DP)
    column = tl.arange(0, HEADS * 16)
    row = first_row + block * 16 + column % 16
    for part in range(HKV * PARTS):
        group = part // PARTS
        member = part % PARTS * HEADS + column // 16
        counts = (member < GROUP) & (row < last_row)
        place = row.to(tl.int64) * HQ + group * GROUP + member
        queries = tl.load(q + place[:, None] * D + dim[None, :], mask=counts[:, None] & (dim < D)[None, :], other=0.0)
        # a column without a head counts nothing: exp2(x - inf) = 0
        log_sum = tl.load(lse + place, mask=counts, other=float("inf")) * 1.4426950408889634
        for tile in range(begin, end, TILE):
            entry = tile + tl.arange(0, TILE)
            inside = entry < end
            if UNION:
                key = tl.load(union_keys + entry, mask=inside, other=0)
                word = tl.load(union_words + entry, mask=inside, other=0).to(tl.int32)
                looks = ((word[:, None] >> query[None, :]) & 1) != 0
                to = p + entry.to(tl.int64)[:, None] * 16 + query[None, :]
                exists = inside[:, None] & (query >= 0)[None, :]
            else:
                key = entry
                looks = (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
                to = p + block.to(tl.int64) * 16 * width + (query * width)[None, :] + (key - first_key)[:, None]
                exists = inside[:, None] & live[None, :]
            keys = tl.load(
                k + (key.to(tl.int64) * HKV + group)[:, None] * D + dim[None, :],
                mask=inside[:, None] & (dim < D)[None, :], other=0.0,
            )  # fmt: skip
            logits = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            total = tl.sum(tl.reshape(tl.exp2(logits * scale - log_sum[None, :]), (TILE, HEADS, 16)), 1)
            total += tl.load(to, mask=exists & (part > 0), other=0.0)
            # for a key that the row does not see exp2 may overflow, so it is dropped here, not multiplied by 0
            tl.store(to, tl.where(looks, total, 0.0), mask=exists)
        tl.debug_barrier()  # the next heads may read what another thread of the program wrote
