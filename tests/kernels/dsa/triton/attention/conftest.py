"""Selections by name, and the three views of each: listed keys, marked keys, ranges."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from keye_kernels.dsa.reference import range_mask
from keye_kernels.dsa.triton_backend.blocks import BLOCK, Chunk, Union, block_windows, chunks_of
from keye_kernels.dsa.triton_backend.views import View


def words_of(mask: Tensor) -> Tensor:
    """bool [up to 16 queries, N] -> int16 [N]."""
    bits = (mask.int() << torch.arange(len(mask))[:, None]).sum(0)
    return torch.where(bits >= 2**15, bits - 2**16, bits).short()


def union_of(mask: Tensor, chunk: Chunk) -> Union:
    """bool [T,S] -> the union of each block of the chunk."""
    blocks = mask[chunk.rows].split(BLOCK)
    keys = [block.any(0).nonzero()[:, 0] for block in blocks]
    words = [words_of(block[:, listed]) for block, listed in zip(blocks, keys)]
    sizes = torch.tensor([0, *map(len, keys)])
    return Union(sizes.cumsum(0).int(), torch.cat(keys).int(), torch.cat(words), int(sizes.max()))


def dense_words(mask: Tensor, chunk: Chunk, windows: Tensor) -> Tensor:
    """bool [T,S] -> int16 [nb,W]; every bit set outside a block's window, where nobody may read."""
    words = torch.full((chunk.num_blocks, chunk.width), -1, dtype=torch.int16)
    for at, block in enumerate(mask[chunk.rows].split(BLOCK)):
        low, high = windows[:, chunk.rows.start // BLOCK + at].tolist()
        words[at, low - chunk.keys.start : high - chunk.keys.start] = words_of(block[:, low:high])
    return words


@pytest.fixture
def make_case(layout, device) -> Callable:
    """(arrangement of the parent conftest, share of the visible keys that is selected, rows of a chunk) -> T, S, the mask
    bool [T,S] on the CPU, windows, chunks and views(source): one View a chunk, on the device."""

    def make(name: str, share: float, chunk_rows: int = 32) -> SimpleNamespace:
        num_queries, num_keys, start, stop = layout(name)
        generator = torch.Generator().manual_seed(3)
        mask = range_mask(start, stop, num_keys)
        if share < 1:
            mask &= torch.rand(mask.shape, generator=generator) < share
        windows = block_windows(start, stop)
        chunks = chunks_of(windows, num_queries, pairs=chunk_rows * num_keys)

        def view(source: str, chunk: Chunk) -> View:
            if source == "union":
                union = union_of(mask, chunk)
                at, keys, words = (x.to(device) for x in (union.start, union.keys, union.words))
                return View(chunk, windows.to(device), union=Union(at, keys, words, union.widest))
            if source == "words":
                return View(chunk, windows.to(device), words=dense_words(mask, chunk, windows).to(device))
            assert share == 1, "a range cannot leave keys out"
            return View(chunk, windows.to(device), ranges=(start.to(device), stop.to(device)))

        return SimpleNamespace(
            T=num_queries, S=num_keys, mask=mask, windows=windows, chunks=chunks,
            views=lambda source: [view(source, chunk) for chunk in chunks],
        )  # fmt: skip

    return make
