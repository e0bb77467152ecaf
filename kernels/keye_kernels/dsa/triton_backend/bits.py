"""The words of a block turned on their side: a bit a key for each of its 16 queries.

A thread of a matrix product holds few rows and many columns. With a word a key it loads a word for every column of a tile,
with this two numbers a row; the rest of the mask it has in its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import QUERIES
from .views import UNION, View

TILES = 16  # of 32 keys, in a program


@triton.jit
def place_of(begin, block, width, SOURCE: tl.constexpr):
    """Where the first tile of a block stands: each block has room for its tiles, rounded up to two."""
    return begin // 32 + 2 * block if SOURCE == UNION else block * (width // 32 + 2)


@triton.jit
def turn_words(
    words, union_start, windows, bits, num_windows, first_window, first_key, width, SOURCE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Grid (tiles / TILES, blocks). Writes an even number of tiles of 32 keys, 0 past the last key."""
    block = tl.program_id(1)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    if SOURCE == UNION:
        begin = tl.load(union_start + block)
        size = tl.load(union_start + block + 1) - begin
        source = words + begin
    else:
        begin = tl.load(windows + first_window + block)
        size = tl.load(windows + num_windows + first_window + block) - begin
        source = words + block.to(tl.int64) * width + (begin - first_key)
    inside = tile < tl.cdiv(size, 64) * 2
    position = tl.arange(0, 32)[None, :]
    column = tile[:, None] * 32 + position
    word = tl.load(source + column, mask=column < size, other=0).to(tl.int32)
    target = bits + (place_of(begin, block, width, SOURCE) + tile) * QUERIES
    for query in tl.static_range(QUERIES):
        tl.store(target + query, tl.sum(((word >> query) & 1) << position, 1), mask=inside)


@triton.jit
def visible_keys(bits, tile, query, BN: tl.constexpr):
    """Tiles from `tile` on, query [R] of the block -> bool [R,BN]; BN is 32 or 64."""
    column = tl.arange(0, BN)
    word = tl.load(bits + tile * QUERIES + query)[:, None]
    if BN == 64:
        word = tl.where(column[None, :] < 32, word, tl.load(bits + (tile + 1) * QUERIES + query)[:, None])
    return (word & (1 << (column % 32))[None, :]) != 0


def query_bits(view: View) -> Tensor | None:
    """int32 [tiles, 16] of a view's union or words; None for ranges."""
    chunk, union = view.chunk, view.union
    if union is not None:
        tiles, widest, words, start = (
            union.keys.numel() // 32 + 2 * chunk.num_blocks,
            union.widest,
            union.words,
            union.start,
        )
    elif view.words is not None:
        tiles, widest, words, start = chunk.num_blocks * (chunk.width // 32 + 2), chunk.width, view.words, None
    else:
        return None
    bits = torch.empty(tiles, QUERIES.value, dtype=torch.int32, device=words.device)
    launch(
        turn_words, (-(-widest // (32 * TILES)), chunk.num_blocks), words, start, view.windows, bits,
        view.windows.shape[1], chunk.rows.start // QUERIES.value, chunk.keys.start, chunk.width,
        SOURCE=view.source, TILES=TILES,
    )  # fmt: skip
    return bits
