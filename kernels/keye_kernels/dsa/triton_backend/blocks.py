"""How the queries are cut: blocks of 16 neighbours that share what they load, chunks of blocks that share a buffer.

T queries; nb = blocks in a chunk; C = rows in a chunk; W = keys in a chunk's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 16  # queries in a block: one bit each in a 16-bit word per key
PAIRS_PER_CHUNK = 2**28  # fp32 scores of a chunk: at most 1 GiB
ROWS_PER_CHUNK = 2**14


@dataclass(frozen=True)
class Chunk:
    """Consecutive queries and the window of keys that holds all their ranges; both on the host."""

    rows: slice  # begins at a multiple of BLOCK
    keys: slice
    window_entries: int = 0  # the sizes of its blocks' own windows, summed

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // BLOCK)

    @property
    def width(self) -> int:
        return self.keys.stop - self.keys.start


@dataclass
class Union:
    """The keys that the blocks of a chunk look at: block b holds entries start[b]..start[b+1], ascending by key."""

    start: Tensor  # int32 [nb + 1]
    keys: Tensor  # int32 [N], absolute
    words: Tensor  # int16 [N]; bit r: query r of the block looks at this key
    widest: int  # entries of the longest block


def block_windows(key_start: Tensor, key_stop: Tensor) -> Tensor:
    """int32 [T], [T] -> int32 [2, T / 16 rounded up]: lowest start and highest stop of each block; (0, 0) if it sees nothing."""
    filled = key_start < key_stop
    unseen = torch.iinfo(torch.int32).max
    fill = (0, -len(key_start) % BLOCK)
    low = pad(torch.where(filled, key_start, unseen), fill, value=unseen).view(-1, BLOCK).amin(1)
    high = pad(torch.where(filled, key_stop, 0), fill).view(-1, BLOCK).amax(1)
    return torch.stack((torch.where(high == 0, 0, low), high)).int()


def chunks_of(windows: Tensor, num_queries: int, pairs: int | None = None) -> list[Chunk]:
    """block_windows -> chunks in order, of equally many rows, each of at most `pairs` rows x keys where a block allows.

    They follow from the ranges alone, never from heads: tensor-parallel ranks cut alike. Chunks that see nothing are
    left out. Waits for the device once.
    """
    low, high = windows.cpu().long()
    num_blocks, sizes, unseen = len(low), high - low, torch.iinfo(torch.int32).max
    low = torch.where(high == 0, unseen, low)
    pairs = PAIRS_PER_CHUNK if pairs is None else pairs
    blocks = min(ROWS_PER_CHUNK // BLOCK, max(num_blocks, 1))
    while True:
        fill = (0, -num_blocks % blocks)
        first, last = pad(low, fill, value=unseen).view(-1, blocks).amin(1), pad(high, fill).view(-1, blocks).amax(1)
        widest = max((last - first).tolist(), default=0)
        if blocks == 1 or widest * blocks * BLOCK <= pairs:
            break
        blocks = -(-blocks // 2)
    return [
        Chunk(
            slice(at * BLOCK, min((at + blocks) * BLOCK, num_queries)),
            slice(a, b),
            int(sizes[at : at + blocks].sum()),
        )
        for at, a, b in zip(range(0, num_blocks, blocks), first.tolist(), last.tolist())
        if b > 0
    ]
