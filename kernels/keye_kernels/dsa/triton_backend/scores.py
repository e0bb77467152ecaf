"""The indexer's scores of one chunk: I[t,s] = Di**-0.5 * sum_h iw[t,h] * relu(iq[t,h] . ik[s]).

C rows, W keys in the chunk's window, Hi indexer heads, Di indexer dim. Keys are the rows of the matrix product, (head,
query) its columns, queries fastest: a thread then holds all heads of its queries, and the sum over heads needs no exchange.
A score is computed alike wherever its row and key stand in a tile: a decoding step repeats the whole pass bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Chunk
from .launch import launch

# Tiles of 128 keys x 128 columns, 8 warps, 3 stages. Registers / spills / bytes of shared memory, bf16, Triton 3.6:
#             sm_80              sm_90 (wgmma)      sm_100 (tcgen05)   gfx942 (VGPR, LDS)
#   16 x 64   182 / 0 /  65536   126 / 0 /  69632   210 / 0 /  73744   160 / 0 / 49152
#   32 x 128  172 / 0 / 106496   124 / 0 / 133120   182 / 0 / 135184   166 / 0 / 73728 (above the 64 KiB there)
#   64 x 128  162 / 0 / 102400   120 / 0 / 132096   174 / 0 / 133136   166 / 0 / 69632 (above the 64 KiB there)
#   4 x 32    128 / 0 /  40960   163 / 0 /  36864   226 / 0 /  65552   200 / 0 / 81920 (above the 64 KiB there)
# 126 registers leave room for two programs on an SM, so that one multiplies while the other sums over its heads.
SPAN = 2048  # keys of a program: its queries are loaded once for all of them


def scores(iq: Tensor, ik: Tensor, iw: Tensor, key_start: Tensor, key_stop: Tensor, chunk: Chunk) -> Tensor:
    """iq [T,Hi,Di], ik [S,Di], iw [T,Hi], key_start, key_stop int32 [T] -> logits fp32 [C,W], column 0 = chunk.keys.start.

    Where no row of a tile sees any of its keys, nothing is written: read what a row sees, and no more.
    """
    _, num_heads, dim = iq.shape
    logits = torch.empty(chunk.num_rows, chunk.width, dtype=torch.float32, device=iq.device)
    tile = tile_of(num_heads, dim, iq.dtype)
    launch(
        _scores, (triton.cdiv(chunk.num_rows, tile["ROWS"]), triton.cdiv(chunk.width, SPAN)),
        iq[chunk.rows], ik, iw[chunk.rows], key_start[chunk.rows], key_stop[chunk.rows], logits, chunk.num_rows,
        chunk.keys.start, chunk.keys.stop, dim**-0.5, **tile,
    )  # fmt: skip
    return logits


def tile_of(num_heads: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's constants: they depend on the indexer's shape and dtype, never on the number of queries or keys."""
    heads, padded_dim = triton.next_power_of_2(num_heads), max(16, triton.next_power_of_2(dim))
    full_precision = dtype == torch.float32  # no matrix units: smaller tiles, or the registers spill
    columns = 64 if full_precision else 128
    return dict(
        HEADS=num_heads, DIM=dim, PADDED_HEADS=heads, PADDED_DIM=padded_dim, ROWS=max(1, columns // heads),
        KEYS=64 if full_precision or padded_dim > 128 else 128, SPAN=SPAN,
        num_warps=8, num_stages=2 if full_precision or padded_dim > 128 else 3,
    )  # fmt: skip


@triton.jit
def _scores(
    iq, ik, iw, key_start, key_stop, logits, num_rows, first_key, last_key, scale,
    SPAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    start = tl.load(key_start + row, mask=row < num_rows, other=0)
    stop = tl.load(key_stop + row, mask=row < num_rows, other=0)
    low = tl.min(tl.where(start < stop, start, last_key))
    high = tl.max(tl.where(start < stop, stop, 0))
    span = first_key + tl.program_id(1) * SPAN
    low = span + (tl.maximum(low - span, 0) // KEYS) * KEYS
    high = tl.minimum(high, span + SPAN)
    if low < high:
        column = tl.arange(0, PADDED_HEADS * ROWS)  # head * ROWS + row
        head, query = column // ROWS, first_row + column % ROWS
        real = (head < HEADS) & (query < num_rows)
        d = tl.arange(0, PADDED_DIM)
        at = query.to(tl.int64) * HEADS + head
        q = tl.load(iq + at[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
        w = tl.load(iw + at, mask=real, other=0.0).to(tl.float32)
        out = logits + row.to(tl.int64)[None, :] * (last_key - first_key) - first_key
        for base in tl.range(low, high, KEYS):
            s = base + tl.arange(0, KEYS)
            inside = s < last_key
            k = tl.load(
                ik + s.to(tl.int64)[:, None] * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0
            )
            agreement = tl.dot(k, tl.trans(q), input_precision="ieee")
            agreement = tl.maximum(agreement, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
            if HEADS != PADDED_HEADS:  # an infinite key times the padding's zeros is NaN
                agreement = tl.where((head < HEADS)[None, :], agreement, 0.0)
            score = tl.sum(tl.reshape(agreement, (KEYS, PADDED_HEADS, ROWS)), axis=1) * scale
            tl.store(out + s[:, None], score, mask=inside[:, None] & (row < num_rows)[None, :])
