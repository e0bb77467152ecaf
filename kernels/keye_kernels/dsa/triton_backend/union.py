"""Which keys a block of 16 queries looks at: one 16-bit word per key, then the sorted list of the keys whose word is not 0.

C rows, W keys in the chunk's window, nb blocks, K = topk. Words are dense, int16 [nb,W]: bit r is query r of the block.
Only the columns inside the block's own window are defined; the rest is never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import BLOCK, Chunk, Union, block_windows
from .launch import launch
from .order import order_of

# Columns of a program. One thread then holds all 16 rows of its columns, and a word is made in registers.
# Registers / spills / bytes of shared memory on sm_90: _words 145 / 0 / 16, _scatter 48 / 0 / 8192, _compact 32 / 0 / 4096,
# _list_row 56 / 0 / 8192.
SEGMENT = 512
WARPS = 4


def words(
    logits: Tensor, tau: Tensor, cut: Tensor, key_start: Tensor, key_stop: Tensor, windows: Tensor, chunk: Chunk
) -> tuple[Tensor, Tensor]:
    """logits [C,W], tau and cut [C] of `thresholds`, key_start and key_stop [T], windows [2,T/16]
    -> words int16 [nb,W], counts int32 [nb,segments]: the words that are not 0 in each 512 columns."""
    grid = (triton.cdiv(chunk.width, SEGMENT), chunk.num_blocks)
    made = torch.empty(chunk.num_blocks, chunk.width, dtype=torch.int16, device=logits.device)
    counts = torch.empty(grid[::-1], dtype=torch.int32, device=logits.device)
    launch(
        _words, grid, logits, tau, cut, key_start[chunk.rows], key_stop[chunk.rows], *_of_chunk(windows, chunk),
        made, counts, chunk.num_rows, chunk.width, chunk.keys.start,
        num_warps=WARPS, BLOCK=BLOCK, SEGMENT=SEGMENT,
    )  # fmt: skip
    return made, counts


def words_of_indices(indices: Tensor, windows: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """indices int32 [T,K], -1 padded, windows of `index_windows` -> words and counts as above, words 0 where undefined."""
    num_blocks, width = chunk.num_blocks, chunk.width
    flat = torch.zeros(num_blocks * width + num_blocks * width % 2, dtype=torch.int16, device=indices.device)
    listed = indices[chunk.rows].reshape(-1)
    launch(
        _scatter, (triton.cdiv(len(listed), 1024),), listed, flat.view(torch.int32), len(listed), indices.shape[1],
        width, chunk.keys.start, num_warps=WARPS, BLOCK=BLOCK, SIZE=1024,
    )  # fmt: skip
    made = flat[: num_blocks * width].view(num_blocks, width)
    used = torch.nn.functional.pad(made != 0, (0, -width % SEGMENT)).view(num_blocks, -1, SEGMENT)
    return made, used.sum(-1, dtype=torch.int32)


def index_windows(indices: Tensor) -> Tensor:
    """indices int32 [T,K], -1 padded -> int32 [2, T / 16 rounded up], as block_windows; (0, 0) for a block without keys."""
    if indices.shape[1] == 0:
        indices = indices.new_full((len(indices), 1), -1)
    unlisted = torch.iinfo(torch.int32).max
    return block_windows(torch.where(indices < 0, unlisted, indices).amin(1), indices.amax(1) + 1)


def union(words: Tensor, counts: Tensor, windows: Tensor, chunk: Chunk) -> Union:
    """words, counts as above -> the keys whose word is not 0, by block, ascending. Waits for the device once."""
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    start = torch.nn.functional.pad(ends.view(counts.shape)[:, -1], (1, 0))
    total, widest = torch.stack((ends[-1], start.diff().amax())).tolist()
    keys = torch.empty(total, dtype=torch.int32, device=words.device)
    kept = torch.empty(total, dtype=torch.int16, device=words.device)
    if total:
        launch(
            _compact, (counts.shape[1], chunk.num_blocks), words, counts, ends, *_of_chunk(windows, chunk), keys, kept,
            chunk.width, chunk.keys.start, num_warps=WARPS, SEGMENT=SEGMENT,
        )  # fmt: skip
    return Union(start, keys, kept, widest)


def write_indices(words: Tensor, windows: Tensor, chunk: Chunk, indices: Tensor) -> None:
    """Fills indices[chunk.rows] of an int32 [T,K]: the row's keys, ascending, then -1. Rows in no chunk are left alone."""
    launch(
        _list_row, (chunk.num_rows,), words, *_of_chunk(windows, chunk), indices[chunk.rows], chunk.width,
        chunk.keys.start, indices.shape[1], num_warps=WARPS, BLOCK=BLOCK, SIZE=1024,
    )  # fmt: skip


def _of_chunk(windows: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Lowest and highest key of the chunk's blocks, each [nb]."""
    first = chunk.rows.start // BLOCK
    low, high = windows[:, first : first + chunk.num_blocks]
    return low, high


@triton.jit
def _words(
    logits, tau, cut, key_start, key_stop, low, high, words, counts, num_rows, width, first_key,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    segment, block = tl.program_id(0), tl.program_id(1)
    window_start, window_stop = tl.load(low + block) - first_key, tl.load(high + block) - first_key
    count = 0
    if (segment * SEGMENT < window_stop) & (segment * SEGMENT + SEGMENT > window_start):
        row = block * BLOCK + tl.arange(0, BLOCK)
        real = row < num_rows
        start = tl.load(key_start + row, mask=real, other=0) - first_key
        stop = tl.load(key_stop + row, mask=real, other=0) - first_key
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        visible = real[:, None] & (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        order = order_of(tl.load(logits + at, mask=visible, other=0.0))
        least = tl.load(tau + row, mask=real, other=0)[:, None]
        last = tl.load(cut + row, mask=real, other=0)[:, None] - first_key
        chosen = visible & ((order > least) | ((order == least) & (column[None, :] <= last)))
        word = tl.sum(chosen.to(tl.int32) << tl.arange(0, BLOCK)[:, None], axis=0)
        inside = (column >= window_start) & (column < window_stop)
        tl.store(words + block.to(tl.int64) * width + column, word.to(tl.int16), mask=inside)
        count = tl.sum((inside & (word != 0)).to(tl.int32))
    tl.store(counts + block * tl.num_programs(0) + segment, count)


@triton.jit
def _scatter(listed, pairs, size, topk, width, first_key, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Two words share an int32, the narrowest that every device can OR atomically; the order of ORs does not matter."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    key = tl.load(listed + at, mask=at < size, other=-1)
    row = at // topk
    word = (row // BLOCK) * width + (key - first_key)
    bit = tl.full([SIZE], 1, tl.int32) << ((row % BLOCK) + 16 * (word & 1)).to(tl.int32)
    tl.atomic_or(pairs + (word >> 1), bit, mask=key >= 0, sem="relaxed")


@triton.jit
def _compact(words, counts, ends, low, high, keys, kept, width, first_key, SEGMENT: tl.constexpr):
    segment, block = tl.program_id(0), tl.program_id(1)
    number = block * tl.num_programs(0) + segment
    count = tl.load(counts + number)
    if count > 0:
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        inside = (column >= tl.load(low + block) - first_key) & (column < tl.load(high + block) - first_key)
        word = tl.load(words + block.to(tl.int64) * width + column, mask=inside, other=0)
        used = word != 0
        slot = tl.load(ends + number) - count + tl.cumsum(used.to(tl.int32), axis=0) - 1
        tl.store(keys + slot, column + first_key, mask=used)
        tl.store(kept + slot, word, mask=used)


@triton.jit
def _list_row(words, low, high, indices, width, first_key, topk, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0)
    block = row // BLOCK
    window_start, window_stop = tl.load(low + block) - first_key, tl.load(high + block) - first_key
    indices += row.to(tl.int64) * topk
    words += block.to(tl.int64) * width
    count = 0
    for at in range(window_start, window_stop, SIZE):
        column = at + tl.arange(0, SIZE)
        word = tl.load(words + column, mask=column < window_stop, other=0).to(tl.int32)
        chosen = (word >> (row % BLOCK)) & 1
        slot = count + tl.cumsum(chosen, axis=0) - 1
        tl.store(indices + slot, column + first_key, mask=(chosen != 0) & (slot < topk))
        count += tl.sum(chosen)
    for at in range(0, topk, SIZE):
        slot = at + tl.arange(0, SIZE)
        tl.store(indices + slot, tl.full([SIZE], -1, tl.int32), mask=(slot >= count) & (slot < topk))
