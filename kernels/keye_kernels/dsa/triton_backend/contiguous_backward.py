"""Gradients of attention over contiguous keys, marked or ranged: one kernel for q, one for k and v, no atomics.

The first walks the keys of a block's window, the second the blocks that look at a tile of keys; each recomputes the
products of the other, and every sum has one order, so the gradients are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import LOG2_E
from .bits import place_of, query_bits, visible_keys
from .launch import launch
from .rows import QUERIES, interior, load_keys, load_rows, row_addresses, row_mask, rows_of, window_tile
from .views import WORDS, View, heads_of, padded_dim, power_of_two


@triton.jit
def query_step(
    total, queries, grads, keys, values, visible, row_lse, row_delta, scale_log2, MASKED: tl.constexpr
):  # fmt: skip
    """Adds a tile of keys to the gradient of the queries, not yet scaled: total [R,DP]."""
    logits = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    weights = tl.exp2(logits * scale_log2 - row_lse[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
    grad_logits = (weights * (grad_weights - row_delta[:, None])).to(keys.dtype)
    return tl.dot(grad_logits, keys, total, input_precision="ieee")


@triton.jit
def query_gradients(
    q, k, v, grad_out, lse, delta, grad_q, bits, key_start, key_stop, windows,
    num_windows, first_query, end_query, width, part, scale, scale_log2,
    SOURCE: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the chunk, Hkv)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    block_query = first_query + block * QUERIES
    query, exists, at_row = rows_of(block_query, end_query, kv_head, part, QUERIES, HKV, G, GP)
    queries, grads = load_rows(q, at_row, exists, D, DP), load_rows(grad_out, at_row, exists, D, DP)
    row_lse = tl.load(lse + at_row, mask=exists, other=0.0) * (scale_log2 / scale)
    row_delta = tl.load(delta + at_row, mask=exists, other=0.0)
    total = tl.zeros([QUERIES * GP, DP], tl.float32)
    window = block_query // QUERIES
    low, high = tl.load(windows + window), tl.load(windows + num_windows + window)
    if SOURCE == WORDS:
        place = place_of(low, block, width, SOURCE)
        for at in tl.range(low, high, BN, num_stages=STAGES):
            key, _ = window_tile(at, high, BN)
            keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
            visible = visible_keys(bits, place + (at - low) // 32, query - block_query, BN)
            total = query_step(total, queries, grads, keys, values, visible, row_lse, row_delta, scale_log2, True)
    else:
        start = tl.load(key_start + query, mask=exists, other=0)
        stop = tl.load(key_stop + query, mask=exists, other=2147483647)
        first, last, others = interior(low, high, tl.max(start, 0), tl.min(stop, 0), BN)
        for at in tl.range(first, last, BN, num_stages=STAGES):
            key = at + tl.arange(0, BN)
            keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
            total = query_step(total, queries, grads, keys, values, True, row_lse, row_delta, scale_log2, False)
        for tile in tl.range(others, num_stages=STAGES):
            at = low + tile * BN
            at = tl.where(at < first, at, at + (last - first))
            key, inside = window_tile(at, high, BN)
            keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
            visible = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None]) & inside[None, :]
            total = query_step(total, queries, grads, keys, values, visible, row_lse, row_delta, scale_log2, True)
    mask = row_mask(exists, D, DP)
    tl.store(row_addresses(grad_q, at_row, D, DP), (total * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def key_gradients(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, words, key_start, key_stop, windows,
    num_windows, first_query, end_query, first_key, width, num_blocks, part, scale, scale_log2,
    SOURCE: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCKS: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BN keys of the chunk, Hkv). A program walks the queries, STEP <= 16 at a time; keys are the rows."""
    at = first_key + tl.program_id(0) * BN
    kv_head = tl.program_id(1)
    end_key = first_key + width
    key, inside = window_tile(at, end_key, BN)
    keys, values = load_keys(k, key, kv_head, HKV, D, DP), load_keys(v, key, kv_head, HKV, D, DP)
    grad_keys = tl.zeros([BN, DP], tl.float32)
    grad_values = tl.zeros([BN, DP], tl.float32)
    # The first and the last block whose window meets this tile; those between mask what they do not see.
    block = tl.arange(0, BLOCKS)
    block_window = windows + first_query // QUERIES + block
    low = tl.load(block_window, mask=block < num_blocks, other=0)
    high = tl.load(block_window + num_windows, mask=block < num_blocks, other=0)
    meets = (low < at + BN) & (high > at)
    first_block = tl.min(tl.where(meets, block, BLOCKS), 0)
    last_block = tl.max(tl.where(meets, block, -1), 0)
    first, last = first_block * QUERIES, (last_block + 1) * QUERIES
    for begin in tl.range(first, last, STEP, num_stages=STAGES):
        query, exists, at_row = rows_of(first_query + begin, end_query, kv_head, part, STEP, HKV, G, GP)
        queries, grads = load_rows(q, at_row, exists, D, DP), load_rows(grad_out, at_row, exists, D, DP)
        row_lse = tl.load(lse + at_row, mask=exists, other=0.0) * (scale_log2 / scale)
        row_delta = tl.load(delta + at_row, mask=exists, other=0.0)
        if SOURCE == WORDS:
            step_block = begin // QUERIES
            window = first_query // QUERIES + step_block
            low_key, high_key = tl.load(windows + window), tl.load(windows + num_windows + window)
            own = inside & (key >= low_key) & (key < high_key)
            word = tl.load(words + step_block.to(tl.int64) * width + (key - first_key), mask=own, other=0).to(tl.int32)
            visible = ((word[:, None] >> (query - first_query - step_block * QUERIES)[None, :]) & 1) != 0
        else:
            start = tl.load(key_start + query, mask=exists, other=0)
            stop = tl.load(key_stop + query, mask=exists, other=0)
            # start <= stop: unsigned, one comparison answers for both ends.
            visible = (key[:, None] - start[None, :]).to(tl.uint32) < (stop - start)[None, :].to(tl.uint32)
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        weights = tl.exp2(tl.where(visible, logits * scale_log2 - row_lse[None, :], float("-inf")))
        grad_values = tl.dot(weights.to(values.dtype), grads, grad_values, input_precision="ieee")
        grad_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
        grad_logits = (weights * (grad_weights - row_delta[None, :])).to(keys.dtype)
        grad_keys = tl.dot(grad_logits, queries, grad_keys, input_precision="ieee")
    place = key.to(tl.int64) * HKV + kv_head
    mask = row_mask(inside & (first_block <= last_block), D, DP)
    # One program a launch adds to a key: an atomic's order is no question here, and it spares reading the old sum back.
    tl.atomic_add(row_addresses(grad_v, place, D, DP), grad_values, mask=mask, sem="relaxed")
    tl.atomic_add(row_addresses(grad_k, place, D, DP), grad_keys * scale, mask=mask, sem="relaxed")


def query_tiles(dtype: torch.dtype, padded: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile of keys and pipeline of query_gradients for a padded head dim.

    At 128 rows and D = 128, sm_90 takes registers / KiB of shared memory: words 202 / 162, range 219 / 160, no spills.
    """
    if dtype == torch.float32:
        return dict(BN=32, STAGES=1, num_warps=4)
    if amd:
        return dict(BN=32, STAGES=1, num_warps=8)
    return dict(BN=64 if padded <= 128 else 32, STAGES=3 if padded <= 128 else 1, num_warps=8)


def key_tiles(dtype: torch.dtype, padded: int, heads: int, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile of keys, queries a step and pipeline of key_gradients, for a padded head dim and the heads of a program.

    At D = 128, sm_90 takes registers / KiB of shared memory: words 243 / 112, range 255 / 113, no spills; steps of 64 rows
    spill, for what is known of a query is held once for each row of keys that a thread has.
    """
    if dtype == torch.float32:
        return dict(BN=32, STEP=16 // heads, STAGES=1, num_warps=4)
    keys = min(128, 2**14 // padded)
    return dict(BN=32 if amd else keys, STEP=min(16, 32 // heads), STAGES=1 if amd else 3, num_warps=8)


def contiguous_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, view: View,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """Writes the chunk's rows of grad_q [T,Hq,D] and adds to grad_k and grad_v, float32 [S,Hkv,D]. view has words or ranges."""
    chunk, heads, dim = view.chunk, heads_of(q, k), padded_dim(q.shape[2])
    assert view.union is None
    marks = (*(view.ranges or (None, None)), view.windows, view.windows.shape[1], chunk.rows.start, chunk.rows.stop)
    bits = query_bits(view)
    shape = dict(SOURCE=view.source, HKV=heads.kv, G=heads.group, GP=heads.padded, D=q.shape[2], DP=dim)
    key_tile = key_tiles(q.dtype, dim, heads.padded)
    for part in range(heads.parts):
        launch(
            query_gradients, (chunk.num_blocks, heads.kv), q, k, v, grad_out, lse, delta, grad_q, bits, *marks, chunk.width,
            part, scale, scale * LOG2_E, **shape, **query_tiles(q.dtype, dim),
        )  # fmt: skip
        launch(
            key_gradients, (-(-chunk.width // key_tile["BN"]), heads.kv), q, k, v, grad_out, lse, delta, grad_k, grad_v,
            view.words, *marks, chunk.keys.start, chunk.width, chunk.num_blocks, part, scale, scale * LOG2_E,
            **shape, BLOCKS=power_of_two(chunk.num_blocks), **key_tile,
        )  # fmt: skip
