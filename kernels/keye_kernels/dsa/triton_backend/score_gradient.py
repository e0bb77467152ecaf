"""The loss's gradient with respect to the scores, in the place of the teacher.

T queries, S keys, Hi indexer heads, Di indexer dim; N union entries; C rows and W keys of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import BLOCK, Chunk, Union
from .indexer_rows import load_heads, load_keys
from .launch import launch


@dataclass(frozen=True)
class Tiles:
    heads: int
    queries: int  # of a program, 8 or 16; a dot's columns are (head, query)
    keys: int  # its rows
    segment: int  # keys of one program
    num_warps: int
    num_stages: int


# Hi x Di = 16 x 64, bf16, Triton 3.6. Registers / spills / bytes of shared memory:
#          sm_80              sm_90 (wgmma)      sm_100 (tcgen05)   gfx942 (VGPR)
#   union  168 / 0 / 33024    128 / 0 / 33024    168 / 0 / 33040    176 / 0
#   range  92 / 0 / 0         90 / 0 / 0         90 / 0 / 0         45 / 0
# Four programs share an sm_90 processor. With 16 queries: 236 registers, two programs, and Triton 3.9 spills.
# 64 x 128 (WIDE) on sm_90: 200 / 0 / 114944.
HALF = Tiles(heads=16, queries=8, keys=64, segment=1024, num_warps=4, num_stages=3)
WIDE = Tiles(heads=8, queries=16, keys=64, segment=1024, num_warps=4, num_stages=2)  # Di above 64
FULL = Tiles(heads=4, queries=8, keys=16, segment=256, num_warps=4, num_stages=1)


def tiles_of(iq: Tensor) -> Tiles:
    """iq [T,Hi,Di]."""
    if iq.dtype == torch.float32:
        return FULL
    return HALF if iq.shape[2] <= 64 else WIDE


def score_gradient(
    p: Tensor, heads: int, iq: Tensor, ik: Tensor, iw: Tensor, student_lse: Tensor, grad_kl: Tensor, key_start: Tensor,
    key_stop: Tensor, windows: Tensor, chunk: Chunk, union: Union | None = None, logits: Tensor | None = None,
) -> None:  # fmt: skip
    """p, as `teacher` made it, becomes grad_kl[t] * (exp(I - student_lse[t]) - p / heads), 0 where a query does not look.

    iq [T,Hi,Di], ik [S,Di], iw [T,Hi]; student_lse and grad_kl float32 [T]; heads is how many p sums over, on all ranks.
    With a union p is [N,16], and the scores I are formed anew at its entries. Without, p is [C,W] and logits [C,W] holds them.
    """
    places = (chunk.rows.start, chunk.rows.stop)
    if union is None:
        assert logits is not None, "over whole ranges the scores are read"
        grid = (chunk.num_blocks, triton.cdiv(chunk.width, 128))
        launch(
            _over_ranges, grid, p, logits, student_lse, grad_kl, key_start, key_stop, windows, 1 / heads, *places,
            chunk.keys.start, chunk.width, windows.shape[1], TILE=128, num_warps=4,
        )  # fmt: skip
        return
    (_, num_heads, dim), tiles = iq.shape, tiles_of(iq)
    launch(
        _over_union, (chunk.num_blocks, triton.cdiv(union.widest, tiles.segment), BLOCK // tiles.queries),
        p, iq, ik, iw, student_lse, grad_kl, union.start, union.keys, union.words, 1 / heads, dim**-0.5, *places,
        H=num_heads, D=dim, DP=max(triton.next_power_of_2(dim), 16),
        HEADS=min(triton.next_power_of_2(num_heads), tiles.heads), QUERIES=tiles.queries, TILE=tiles.keys,
        SEGMENT=tiles.segment, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


@triton.jit
def _head_sum(keys, queries, gates, TILE: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """[TILE,DP], [HEADS*QUERIES,DP], [HEADS*QUERIES] -> [TILE,QUERIES]: sum over heads of gate * relu(query . key)."""
    agreement = tl.maximum(tl.dot(keys, tl.trans(queries), input_precision="ieee"), 0.0)
    return tl.sum(tl.reshape(agreement * gates[None, :], (TILE, HEADS, QUERIES)), 1)


@triton.jit(do_not_specialize=["last_row"])
def _over_union(
    p, iq, ik, iw, student_lse, grad_kl, union_start, union_keys, union_words, share, scale, first_row, last_row,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program (block, segment, part): QUERIES of its 16 queries, SEGMENT of their keys."""
    block = tl.program_id(0)
    begin = tl.load(union_start + block) + tl.program_id(1) * SEGMENT
    end = tl.minimum(tl.load(union_start + block + 1), begin + SEGMENT)
    if begin >= end:
        return
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    row = first_row + block * 16 + query
    live = row < last_row
    log_sum = tl.load(student_lse + row, mask=live, other=0.0)
    upstream = tl.load(grad_kl + row, mask=live, other=0.0)
    first = first_row + block * 16 + tl.program_id(2) * QUERIES
    queries, gates, _, _ = load_heads(iq, iw, first, last_row, 0, H, D, DP, HEADS, QUERIES)
    for tile in range(begin, end, TILE):
        entry = tile + tl.arange(0, TILE)
        inside = entry < end
        key = tl.load(union_keys + entry, mask=inside, other=0)
        word = tl.load(union_words + entry, mask=inside, other=0).to(tl.int32)
        keys = load_keys(ik, key, inside, D, DP)
        score = _head_sum(keys, queries, gates, TILE, HEADS, QUERIES)
        for part in range(1, (H + HEADS - 1) // HEADS):
            more_queries, more_gates, _, _ = load_heads(iq, iw, first, last_row, part, H, D, DP, HEADS, QUERIES)
            score += _head_sum(keys, more_queries, more_gates, TILE, HEADS, QUERIES)
        at = p + entry.to(tl.int64)[:, None] * 16 + query[None, :]
        exists = inside[:, None] & (query >= 0)[None, :]
        teacher = tl.load(at, mask=exists, other=0.0) * share
        looks = ((word[:, None] >> query[None, :]) & 1) != 0
        gradient = upstream[None, :] * (tl.exp(score * scale - log_sum[None, :]) - teacher)
        tl.store(at, tl.where(looks, gradient, 0.0), mask=exists)


@triton.jit(do_not_specialize=["last_row", "first_key", "num_windows"])
def _over_ranges(
    p, logits, student_lse, grad_kl, key_start, key_stop, windows, share, first_row, last_row, first_key, width, num_windows,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (block, tile): 16 queries, TILE columns of the chunk."""
    block = tl.program_id(0)
    tile = first_key + tl.program_id(1) * TILE
    low = tl.load(windows + first_row // 16 + block)
    high = tl.load(windows + num_windows + first_row // 16 + block)
    if (tile >= high) | (tile + TILE <= low):
        return
    query = tl.arange(0, 16)
    row = first_row + block * 16 + query
    live = row < last_row
    start = tl.load(key_start + row, mask=live, other=0)
    stop = tl.load(key_stop + row, mask=live, other=0)
    log_sum = tl.load(student_lse + row, mask=live, other=0.0)
    upstream = tl.load(grad_kl + row, mask=live, other=0.0)
    key = tile + tl.arange(0, TILE)
    looks = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
    at = (block * 16 + query).to(tl.int64)[:, None] * width + (key - first_key)[None, :]
    score = tl.load(logits + at, mask=looks, other=0.0)
    teacher = tl.load(p + at, mask=looks, other=0.0) * share
    gradient = upstream[:, None] * (tl.exp(score - log_sum[:, None]) - teacher)
    inside = (key >= low) & (key < high)
    tl.store(p + at, tl.where(looks, gradient, 0.0), mask=live[:, None] & inside[None, :])
