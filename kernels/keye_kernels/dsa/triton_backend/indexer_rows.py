"""The indexer's queries as the columns or rows of a dot, head first, and what a tile's shape may be."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_heads(
    iq, iw, row, last_row, part,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """N = HEADS * QUERIES: heads from part * HEADS on, head by head, of the queries from `row` on
    -> queries [N,DP], gates float32 [N], their place [N] in [T*H], and whether there is one. What is not there is 0."""
    number = tl.arange(0, HEADS * QUERIES)
    dim = tl.arange(0, DP)
    head = part * HEADS + number // QUERIES
    exists = (row + number % QUERIES < last_row) & (head < H)
    place = (row + number % QUERIES).to(tl.int64) * H + head
    queries = tl.load(iq + place[:, None] * D + dim[None, :], mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    gates = tl.load(iw + place, mask=exists, other=0.0).to(tl.float32)
    return queries, gates, place, exists


@triton.jit
def load_keys(ik, key, inside, D: tl.constexpr, DP: tl.constexpr):
    """ik [S,D], key [N] -> [N,DP], 0 where there is none."""
    dim = tl.arange(0, DP)
    return tl.load(
        ik + key.to(tl.int64)[:, None] * D + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
    )
