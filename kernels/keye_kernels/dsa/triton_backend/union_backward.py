"""Gradients of attention over listed keys: one kernel, a program for each block of 16 queries and each KV head.

The gradient of q stays in registers. Those of k and v meet from many blocks: added in place by float32 atomics (fast; their
order, and so the last bits, differ from run to run), or laid down entry by entry and added up in the order of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import LOG2_E
from .bits import place_of, query_bits, visible_keys
from .launch import launch
from .rows import QUERIES, load_keys, load_rows, row_addresses, row_mask, rows_of, union_tile
from .segments import add_segments, segments_of
from .views import UNION, View, heads_of, padded_dim

WORKSPACE_BYTES = 2**31


@triton.jit
def contribute(pointers, values, mask, ORDERED: tl.constexpr):
    """Lays a tile down where it has the place to itself, or adds it to what other blocks add."""
    if ORDERED:
        tl.store(pointers, values, mask=mask)
    else:
        tl.atomic_add(pointers, values, mask=mask, sem="relaxed")


@triton.jit
def union_gradients(
    q, k, v, grad_out, lse, delta, grad_q, grad_k, grad_v, union_start, union_keys, bits,
    first_block, first_query, end_query, part, scale, scale_log2,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ORDERED: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, Hkv), from first_block of the chunk on. grad_k and grad_v are [S,Hkv,D]; ORDERED: [entries,Hkv,D]."""
    block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    block_query = first_query + block * QUERIES
    query, exists, at_row = rows_of(block_query, end_query, kv_head, part, QUERIES, HKV, G, GP)
    queries, grads = load_rows(q, at_row, exists, D, DP), load_rows(grad_out, at_row, exists, D, DP)
    row_lse = tl.load(lse + at_row, mask=exists, other=0.0) * (scale_log2 / scale)
    row_delta = tl.load(delta + at_row, mask=exists, other=0.0)
    grad_queries = tl.zeros([QUERIES * GP, DP], tl.float32)
    base = tl.load(union_start + first_block)
    begin, end = tl.load(union_start + block), tl.load(union_start + block + 1)
    tiles = place_of(begin, block, 0, UNION)
    for at in tl.range(begin, end, BN, num_stages=STAGES):
        key = union_tile(union_keys, at, end, BN)
        keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
        visible = visible_keys(bits, tiles + (at - begin) // 32, query - block_query, BN)
        entry = at + tl.arange(0, BN)
        mask = row_mask(entry < end, D, DP)
        place = ((entry - base if ORDERED else key).to(tl.int64)) * HKV + kv_head
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weights = tl.where(visible, tl.exp2(logits * scale_log2 - row_lse[:, None]), 0.0)
        grad_values = tl.dot(tl.trans(weights.to(q.dtype.element_ty)), grads, input_precision="ieee")
        contribute(row_addresses(grad_v, place, D, DP), grad_values, mask, ORDERED)
        grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
        grad_logits = (weights * (grad_weights - row_delta[:, None])).to(q.dtype.element_ty)
        grad_keys = tl.dot(tl.trans(grad_logits), queries, input_precision="ieee")
        contribute(row_addresses(grad_k, place, D, DP), grad_keys * scale, mask, ORDERED)
        grad_queries = tl.dot(grad_logits, keys, grad_queries, input_precision="ieee")
    # Worked out anew, from a 0 that the compiler cannot see through: else it keeps these in 16 registers through the loop.
    _, exists, at_row = rows_of(block_query + tl.minimum(begin, 0), end_query, kv_head, part, QUERIES, HKV, G, GP)
    tl.store(
        row_addresses(grad_q, at_row, D, DP),
        (grad_queries * scale).to(grad_q.dtype.element_ty),
        mask=row_mask(exists, D, DP),
    )


def tiles(dtype: torch.dtype, padded: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile of keys and pipeline for a padded head dim.

    At 128 rows and D = 128, sm_90 takes 240 registers (ordered: 236) and 161 KiB of shared memory, all wgmma without spills,
    atomics four floats wide. 32 keys leave the key gradients to mma.sync.
    """
    if dtype == torch.float32:
        return dict(BN=32, STAGES=1, num_warps=4)
    return dict(BN=32 if amd else 64 if padded <= 128 else 32, STAGES=1 if amd else 2, num_warps=8)


def union_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, view: View,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, deterministic: bool,
) -> None:  # fmt: skip
    """Writes the chunk's rows of grad_q [T,Hq,D] and adds to grad_k and grad_v, float32 [S,Hkv,D]. view has a union.

    deterministic takes a workspace of at most 2 GiB (or what one block needs) and waits for the device once.
    """
    chunk, union, heads, dim = view.chunk, view.union, heads_of(q, k), padded_dim(q.shape[2])
    assert union is not None
    bits = query_bits(view)

    def run(part: int, first: int, blocks: int, to_k: Tensor, to_v: Tensor) -> None:
        launch(
            union_gradients, (blocks, heads.kv), q, k, v, grad_out, lse, delta, grad_q, to_k, to_v,
            union.start, union.keys, bits, first, chunk.rows.start, chunk.rows.stop, part, scale, scale * LOG2_E,
            HKV=heads.kv, G=heads.group, GP=heads.padded, D=q.shape[2], DP=dim, ORDERED=deterministic,
            **tiles(q.dtype, dim),
        )  # fmt: skip

    if not deterministic:
        for part in range(heads.parts):
            run(part, 0, chunk.num_blocks, grad_k, grad_v)
        return
    blocks = max(1, WORKSPACE_BYTES // (8 * heads.kv * q.shape[2] * max(union.widest, 1)))
    firsts = list(range(0, chunk.num_blocks, blocks)) + [chunk.num_blocks]
    bounds = union.start[firsts].tolist()
    for first, after, low, high in zip(firsts, firsts[1:], bounds, bounds[1:]):
        segments = segments_of(union.keys[low:high], chunk.keys)
        entries_k, entries_v = grad_k.new_empty(2, high - low, *grad_k.shape[1:])
        for part in range(heads.parts):
            run(part, first, after - first, entries_k, entries_v)
            add_segments(segments, entries_k, grad_k)
            add_segments(segments, entries_v, grad_v)
