"""Attention of a chunk of queries over the keys that a view gives it.

One program holds the 16 queries of a block with the heads that share a KV head, so a tile of keys is loaded once for 128
rows at Keye's geometry; the softmax is online, in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import place_of, query_bits, visible_keys
from .launch import launch
from .rows import QUERIES, interior, load_keys, load_rows, row_addresses, row_mask, rows_of, union_tile, window_tile
from .views import UNION, WORDS, View, heads_of, padded_dim

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
LEAST = tl.constexpr(-3.0e38)  # finite, so that a row which has seen no key yet subtracts it without a NaN


@triton.jit
def softmax_step(acc, total, peak, q, keys, values, visible, scale, MASKED: tl.constexpr):
    """Adds a tile of keys to the running softmax: acc [R,DP], total and peak [R]; scale includes log2(e)."""
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def attend(
    q, k, v, out, lse, union_start, union_keys, bits, key_start, key_stop, windows,
    num_windows, first_query, end_query, width, part, scale,
    SOURCE: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the chunk, Hkv). The last blocks, longest where attention is causal, start first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    block_query = first_query + block * QUERIES
    query, exists, at_row = rows_of(block_query, end_query, kv_head, part, QUERIES, HKV, G, GP)
    queries = load_rows(q, at_row, exists, D, DP)
    acc = tl.zeros([QUERIES * GP, DP], tl.float32)
    total = tl.zeros([QUERIES * GP], tl.float32)
    peak = tl.full([QUERIES * GP], LEAST, tl.float32)
    if SOURCE == UNION:
        begin, end = tl.load(union_start + block), tl.load(union_start + block + 1)
        place = place_of(begin, block, width, SOURCE)
        for at in tl.range(begin, end, BN, num_stages=STAGES):
            key = union_tile(union_keys, at, end, BN)
            keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
            visible = visible_keys(bits, place + (at - begin) // 32, query - block_query, BN)
            acc, total, peak = softmax_step(acc, total, peak, queries, keys, values, visible, scale, True)
    else:
        window = block_query // QUERIES
        low, high = tl.load(windows + window), tl.load(windows + num_windows + window)
        if SOURCE == WORDS:
            place = place_of(low, block, width, SOURCE)
            for at in tl.range(low, high, BN, num_stages=STAGES):
                key, _ = window_tile(at, high, BN)
                keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
                visible = visible_keys(bits, place + (at - low) // 32, query - block_query, BN)
                acc, total, peak = softmax_step(acc, total, peak, queries, keys, values, visible, scale, True)
        else:
            start = tl.load(key_start + query, mask=exists, other=0)
            stop = tl.load(key_stop + query, mask=exists, other=2147483647)
            first, last, others = interior(low, high, tl.max(start, 0), tl.min(stop, 0), BN)
            for at in tl.range(first, last, BN, num_stages=STAGES):
                key = at + tl.arange(0, BN)
                keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
                acc, total, peak = softmax_step(acc, total, peak, queries, keys, values, True, scale, False)
            for tile in tl.range(others, num_stages=STAGES):
                at = low + tile * BN
                at = tl.where(at < first, at, at + (last - first))
                key, inside = window_tile(at, high, BN)
                keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
                visible = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None]) & inside[None, :]
                acc, total, peak = softmax_step(acc, total, peak, queries, keys, values, visible, scale, True)
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    acc = acc * (1 / total)[:, None]
    tl.store(row_addresses(out, at_row, D, DP), acc.to(out.dtype.element_ty), mask=row_mask(exists, D, DP))
    tl.store(lse + at_row, tl.where(seen, peak * LN_2 + tl.log(total), float("-inf")), mask=exists)


def tiles(dtype: torch.dtype, padded: int, source: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile of keys and pipeline for a padded head dim.

    At 128 rows and D = 128, sm_90 takes registers / KiB of shared memory: union 184 / 130, words 196 / 130, range 219 / 128,
    all wgmma without spills; 128 keys or 4 warps spill. A union's keys come by way of its list, so that its pipeline is
    two loads deep: 5 stages buffer as many tiles as 3 do elsewhere. gfx942 has 64 KiB.
    """
    if dtype == torch.float32:
        return dict(BN=32, STAGES=1, num_warps=4)
    if amd:
        return dict(BN=32, STAGES=2, num_warps=8)
    return dict(BN=64 if padded <= 128 else 32, STAGES=5 if source == UNION.value else 3, num_warps=8)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, view: View, out: Tensor, lse: Tensor) -> None:
    """Fills the chunk's rows of out [T,Hq,D] and lse float32 [T,Hq] (natural log); q [T,Hq,D], k and v [S,Hkv,D].

    A row that sees no key gets out 0 and lse -inf. ValueError for a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    heads, chunk, dim = heads_of(q, k), view.chunk, padded_dim(q.shape[2])
    tile = tiles(q.dtype, dim, view.source)
    start, keys = (None, None) if view.union is None else (view.union.start, view.union.keys)
    marks = (start, keys, query_bits(view), *(view.ranges or (None, None)), view.windows, view.windows.shape[1])
    for part in range(heads.parts):
        launch(
            attend, (chunk.num_blocks, heads.kv), q, k, v, out, lse, *marks, chunk.rows.start, chunk.rows.stop,
            chunk.width, part, scale * LOG2_E,
            SOURCE=view.source, HKV=heads.kv, G=heads.group, GP=heads.padded, D=q.shape[2], DP=dim, **tile,
        )  # fmt: skip
