"""From the gradient of the scores back to the indexer's queries, keys and gates.

T queries, S keys, Hi indexer heads, Di indexer dim; N union entries; C rows and W keys of a chunk.
With M_h = the gradient of the scores where head h agrees, 0 elsewhere, and the scale Di**-0.5 in it:
d iq_h = iw_h * M_h ik,  d iw_h = iq_h . M_h ik,  d ik = sum_h M_h^T (iw_h * iq_h).
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
from .segments import add_segments, segments_of

WORKSPACE_BYTES = 2**31
PROGRAMS = (
    264  # two for each of 132 processors. A constant, lest another device add up the queries' gradients otherwise
)
KEYS_PER_PROGRAM = 512  # at least


@dataclass(frozen=True)
class Tiles:
    rows: int  # of a dot, (head, query): heads = rows / 16
    keys: int
    num_warps: int
    num_stages: int


# Hi x Di = 16 x 64, bf16, Triton 3.6. Registers / spills / bytes of shared memory:
#                   sm_80              sm_90 (wgmma)      sm_100 (tcgen05)   gfx942 (VGPR)
#   _rows, atomics  255 / 20 / 61440   252 / 0 / 69632    218 / 0 / 81952    462 / 0
#   _rows, ordered  255 / 14 / 61440   246 / 0 / 69632    218 / 0 / 81952    462 / 1
#   _rows, ranges   255 / 34 / 45056   213 / 0 / 53248    216 / 0 / 61472    335 / 0
#   _keys           255 / 186 / 28928  217 / 0 / 45312    218 / 0 / 61984    448 / 0
# 64 x 128 (WIDE) on sm_90: 255 / 0 / 135168, 246 / 0 / 86016 (ranges), 171 / 0 / 86016 (_keys). At 16 x 64 sm_90 holds two
# programs of 4 warps, and 232 registers still do not spill; all 16 heads in one program of 8 warps (256 rows) spill 45.
HALF = Tiles(rows=128, keys=64, num_warps=4, num_stages=2)
WIDE = Tiles(rows=128, keys=64, num_warps=8, num_stages=2)  # Di above 64
FULL = Tiles(rows=32, keys=32, num_warps=4, num_stages=1)


def tiles_of(iq: Tensor) -> Tiles:
    """iq [T,Hi,Di]."""
    if iq.dtype == torch.float32:
        return FULL
    return HALF if iq.shape[2] <= 64 else WIDE


def indexer_backward(
    d_scores: Tensor, iq: Tensor, ik: Tensor, iw: Tensor, windows: Tensor, chunk: Chunk, grad_iq: Tensor, grad_iw: Tensor,
    grad_ik: Tensor, union: Union | None = None, deterministic: bool = False,
) -> None:  # fmt: skip
    """Writes the chunk's rows of grad_iq [T,Hi,Di] and grad_iw [T,Hi], of any float dtype; adds to grad_ik, float32 [S,Di].

    d_scores as `score_gradient` leaves it: float32 [N,16] with a union, [C,W] without (read inside each block's window).
    With a union the keys' gradients are added by atomics, whose order differs from run to run, or, if deterministic, laid
    down in a workspace of at most 2 GiB (or what one block needs) and added in the order of the blocks; this waits for the
    device once. Whole ranges need neither.
    """
    (_, num_heads, dim), tiles = iq.shape, tiles_of(iq)
    heads = min(triton.next_power_of_2(num_heads), tiles.rows // BLOCK)
    parts = triton.cdiv(num_heads, heads)
    shape = dict(
        H=num_heads, D=dim, DP=max(triton.next_power_of_2(dim), 16), HEADS=heads, TILE=tiles.keys,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    first_row, last_row, num_rows = chunk.rows.start, chunk.rows.stop, chunk.num_rows
    where = (chunk.keys.start, chunk.width, windows.shape[1])
    longest = chunk.width if union is None else union.widest
    splits = max(1, min(PROGRAMS // (chunk.num_blocks * parts), triton.cdiv(longest, KEYS_PER_PROGRAM)))
    if splits > 1:  # few blocks of many keys: each block's keys in several programs, their sums added here
        to_iq, to_iw = (grad_ik.new_empty(splits, num_rows, *grad.shape[1:]) for grad in (grad_iq, grad_iw))
    else:
        to_iq, to_iw = grad_iq[chunk.rows], grad_iw[chunk.rows]

    def rows(first_block: int, blocks: int, part: int, parts: int, to: Tensor | None, order: int) -> None:
        launch(
            _rows, (blocks, parts, splits), d_scores, iq, ik, iw, to_iq, to_iw, to, windows,
            *((None, None) if union is None else (union.start, union.keys)),
            first_block, part, dim**-0.5, first_row, last_row, *where, UNION=union is not None, KEYS=order, **shape,
        )  # fmt: skip

    if union is None:
        rows(0, chunk.num_blocks, 0, parts, None, NO_KEYS.value)
        launch(
            _keys, (triton.cdiv(chunk.width, tiles.keys),), d_scores, iq, ik, iw, grad_ik, windows, dim**-0.5, first_row,
            last_row, chunk.num_blocks, *where, BLOCKS=triton.next_power_of_2(chunk.num_blocks), **shape,
        )  # fmt: skip
    elif not deterministic:
        rows(0, chunk.num_blocks, 0, parts, grad_ik, ADD.value)
    else:
        blocks = max(1, WORKSPACE_BYTES // (4 * dim * max(union.widest, 1)))
        firsts = [*range(0, chunk.num_blocks, blocks), chunk.num_blocks]
        bounds = union.start[firsts].tolist()
        for first, after, low, high in zip(firsts, firsts[1:], bounds, bounds[1:]):
            segments = segments_of(union.keys[low:high], chunk.keys)
            entries = grad_ik.new_empty(high - low, dim)
            for part in range(parts):
                rows(first, after - first, part, 1, entries, LAY.value)
                add_segments(segments, entries, grad_ik)
    if splits > 1:
        grad_iq[chunk.rows] = to_iq.sum(0)
        grad_iw[chunk.rows] = to_iw.sum(0)


NO_KEYS, ADD, LAY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["first_block", "first_part", "last_row", "first_key", "num_windows"])
def _rows(
    d_scores, iq, ik, iw, grad_iq, grad_iw, grad_ik, windows, union_start, union_keys,
    first_block, first_part, scale, first_row, last_row, first_key, width, num_windows,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, UNION: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Program (block, part, split): 16 queries, HEADS heads, a share of their keys; the last blocks, longest where attention
    is causal, start first. grad_iq and grad_iw [splits,C,H,...]. KEYS: what becomes of the keys' gradients.

    A 16-bit indexer's M_h is rounded to bf16, whose exponents hold any gradient.
    """
    block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)
    first = first_row + block * 16
    query = tl.arange(0, 16)
    live = first + query < last_row
    queries, gates, place, exists = load_heads(
        iq, iw, first, last_row, first_part + tl.program_id(1), H, D, DP, HEADS, 16
    )
    ROUNDED: tl.constexpr = tl.float32 if iq.dtype.element_ty == tl.float32 else tl.bfloat16
    gated_queries = (queries.to(tl.float32) * gates[:, None]).to(ROUNDED)
    dim = tl.arange(0, DP)
    pulled = tl.zeros([HEADS * 16, DP], tl.float32)
    if UNION:
        base = tl.load(union_start + first_block)
        begin = tl.load(union_start + block)
        end = tl.load(union_start + block + 1)
    else:
        begin = tl.load(windows + first // 16)
        end = tl.load(windows + num_windows + first // 16)
    share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), TILE) * TILE
    begin += tl.program_id(2) * share
    end = tl.minimum(end, begin + share)
    for tile in range(begin, end, TILE):
        entry = tile + tl.arange(0, TILE)
        inside = entry < end
        if UNION:
            key = tl.load(union_keys + entry, mask=inside, other=0)
            at = entry.to(tl.int64)[:, None] * 16 + query[None, :]
        else:
            key = entry
            at = (block * 16 + query).to(tl.int64)[None, :] * width + (key - first_key)[:, None]
        keys = load_keys(ik, key, inside, D, DP)
        upstream = tl.load(d_scores + at, mask=inside[:, None] & live[None, :], other=0.0) * scale
        agreement = tl.reshape(tl.dot(keys, tl.trans(queries), input_precision="ieee"), (TILE, HEADS, 16))
        moved = tl.reshape(tl.where(agreement > 0, upstream[:, None, :], 0.0), (TILE, HEADS * 16)).to(ROUNDED)
        pulled = tl.dot(tl.trans(moved), keys.to(ROUNDED), pulled, input_precision="ieee")
        if KEYS != NO_KEYS:
            pushed = tl.dot(moved, gated_queries, input_precision="ieee")
            mask = inside[:, None] & (dim < D)[None, :]
            if KEYS == ADD:
                to = grad_ik + key.to(tl.int64)[:, None] * D + dim[None, :]
                tl.atomic_add(to, pushed, mask=mask, sem="relaxed")
            else:
                to = grad_ik + (entry - base).to(tl.int64)[:, None] * D + dim[None, :]
                tl.store(to, pushed, mask=mask)
    # loaded again rather than kept: they would take up to 64 registers of a thread through the loop
    queries, gates, place, exists = load_heads(
        iq, iw, first, last_row, first_part + tl.program_id(1), H, D, DP, HEADS, 16
    )
    place += (tl.program_id(2).to(tl.int64) * (last_row - first_row) - first_row) * H
    to = grad_iq + place[:, None] * D + dim[None, :]
    tl.store(to, (pulled * gates[:, None]).to(grad_iq.dtype.element_ty), mask=exists[:, None] & (dim < D)[None, :])
    along = tl.sum(pulled * queries.to(tl.float32), 1)
    tl.store(grad_iw + place, along.to(grad_iw.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["last_row", "num_blocks", "first_key", "num_windows"])
def _keys(
    d_scores, iq, ik, iw, grad_ik, windows, scale, first_row, last_row, num_blocks, first_key, width, num_windows,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program: TILE keys of the chunk's window, all blocks from the first to the last whose window meets them."""
    PARTS: tl.constexpr = (H + HEADS - 1) // HEADS
    tile = first_key + tl.program_id(0) * TILE
    number = tl.arange(0, BLOCKS)
    lows = tl.load(windows + first_row // 16 + number, mask=number < num_blocks, other=0)
    highs = tl.load(windows + num_windows + first_row // 16 + number, mask=number < num_blocks, other=0)
    meets = (lows < tile + TILE) & (highs > tile)
    begin = tl.min(tl.where(meets, number, BLOCKS))
    end = tl.max(tl.where(meets, number + 1, 0))
    if begin >= end:
        return
    key = tile + tl.arange(0, TILE)
    inside = key < first_key + width
    dim = tl.arange(0, DP)
    ROUNDED: tl.constexpr = tl.float32 if iq.dtype.element_ty == tl.float32 else tl.bfloat16
    keys = load_keys(ik, key, inside, D, DP)
    pushed = tl.zeros([TILE, DP], tl.float32)
    query = tl.arange(0, 16)
    for step in range(begin * PARTS, end * PARTS):
        block = step // PARTS
        first = first_row + block * 16
        low = tl.load(windows + first // 16)
        high = tl.load(windows + num_windows + first // 16)
        queries, gates, _, _ = load_heads(iq, iw, first, last_row, step % PARTS, H, D, DP, HEADS, 16)
        at = (block * 16 + query).to(tl.int64)[None, :] * width + (key - first_key)[:, None]
        defined = ((key >= low) & (key < high))[:, None] & (first + query < last_row)[None, :]
        upstream = tl.load(d_scores + at, mask=defined, other=0.0) * scale
        agreement = tl.reshape(tl.dot(keys, tl.trans(queries), input_precision="ieee"), (TILE, HEADS, 16))
        moved = tl.where(agreement > 0, upstream[:, None, :], 0.0) * tl.reshape(gates, (1, HEADS, 16))
        moved = tl.reshape(moved, (TILE, HEADS * 16)).to(ROUNDED)
        pushed = tl.dot(moved, queries.to(ROUNDED), pushed, input_precision="ieee")
    to = grad_ik + key.to(tl.int64)[:, None] * D + dim[None, :]
    mask = inside[:, None] & (dim < D)[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + pushed, mask=mask)
