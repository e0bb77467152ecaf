"""What the attention kernels share: the rows of a block (16 queries x the heads of a KV group), and loads of rows and keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK

QUERIES = tl.constexpr(BLOCK)


@triton.jit
def rows_of(
    first_query, end_query, kv_head, part, COUNT: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr
):
    """COUNT queries from first_query, GP heads each -> their query, whether the row exists, its place in [T*Hq]."""
    row = tl.arange(0, COUNT * GP)
    query = first_query + row // GP
    head = part * GP + row % GP
    exists = (query < end_query) & (head < G)
    return query, exists, (query.to(tl.int64) * HKV + kv_head) * G + head


@triton.jit
def row_addresses(x, at, D: tl.constexpr, DP: tl.constexpr):
    """[R] places -> [R,DP] pointers into x [..., D]."""
    return x + at[:, None] * D + tl.arange(0, DP)[None, :]


@triton.jit
def row_mask(exists, D: tl.constexpr, DP: tl.constexpr):
    """[R] -> [R,DP]: the elements that exist."""
    mask = exists[:, None]
    if D != DP:
        mask = mask & (tl.arange(0, DP) < D)[None, :]
    return mask


@triton.jit
def load_rows(x, at, exists, D: tl.constexpr, DP: tl.constexpr):
    """-> [R,DP], zero where there is nothing."""
    return tl.load(row_addresses(x, at, D, DP), mask=row_mask(exists, D, DP), other=0.0)


@triton.jit
def load_keys(x, key, kv_head, HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """x [S,HKV,D], key [N] all inside S -> [N,DP], zero beyond D."""
    pointers = row_addresses(x, key.to(tl.int64) * HKV + kv_head, D, DP)
    if D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def union_tile(keys, at, end, BN: tl.constexpr):
    """Entries at.. of a union -> key [BN]; past the end key 0, which exists."""
    entry = at + tl.arange(0, BN)
    return tl.load(keys + entry, mask=entry < end, other=0)


@triton.jit
def window_tile(at, high, BN: tl.constexpr):
    """Keys at.. of a window -> key [BN], the last one repeated past the end so that it can be loaded, and which are inside."""
    key = at + tl.arange(0, BN)
    return tl.minimum(key, high - 1), key < high


@triton.jit
def interior(low, high, latest_start, earliest_stop, BN: tl.constexpr):
    """Tiles of BN from low, of which [first, last) are seen whole by every row -> first, last, and how many tiles remain.

    An empty range may lie anywhere, beyond the window too, and where every row's is empty the window is (0, 0)."""
    earliest_stop = tl.minimum(earliest_stop, high)
    first = low + tl.cdiv(tl.minimum(tl.maximum(latest_start, low), high) - low, BN) * BN
    last = tl.maximum(low + (tl.maximum(earliest_stop, low) - low) // BN * BN, first)
    return first, last, (first - low) // BN + tl.cdiv(tl.maximum(high - last, 0), BN)
