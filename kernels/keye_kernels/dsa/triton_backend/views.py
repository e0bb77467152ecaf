"""Where the blocks of a chunk find the keys they look at, and the tiles that attention cuts from them.

A block is 16 neighbouring queries. Its keys are listed (a union: gathered), marked in a bit mask over its window (words:
contiguous) or simply its queries' ranges (contiguous). The three give the same attention; they differ in what they load.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .blocks import Chunk, Union

UNION, WORDS, RANGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# A tile of a contiguous window is shared by neighbouring blocks through the L2 cache and needs no atomics backward; a
# gathered one is neither. Both cost the same products per key, so gathering pays once it skips this share of the keys.
CONTIGUOUS_SHARE = 0.5

log = logging.getLogger("keye_kernels.dsa")


@dataclass(frozen=True)
class View:
    """The keys of one chunk: exactly one of union, words and ranges is given."""

    chunk: Chunk
    windows: Tensor  # int32 [2, blocks of all queries]; read with words and ranges
    union: Union | None = None
    words: Tensor | None = None  # int16 [nb, W], defined inside each block's window
    ranges: tuple[Tensor, Tensor] | None = None  # key_start, key_stop int32 [T]

    @property
    def source(self) -> int:
        return (UNION if self.union is not None else WORDS if self.words is not None else RANGE).value


@dataclass(frozen=True)
class Heads:
    """Query heads [Hkv * group] of a program: `part` of the heads that share a KV head, padded to a power of two."""

    kv: int
    group: int
    padded: int  # query heads of one program

    @property
    def parts(self) -> int:
        return -(-self.group // self.padded)


def heads_of(q: Tensor, k: Tensor) -> Heads:
    """[T,Hq,D], [S,Hkv,D]: at most 8 heads a program, 128 rows with 16 queries; fewer where D is above 128, and 2 in float32,
    which multiplies without tensor cores and holds its operands in registers. ValueError for D above 512."""
    if q.shape[2] > 512:
        raise ValueError(
            f"q: head dim {q.shape[2]} is above 512, the most that the Triton kernels' tiles have room for"
        )
    group = q.shape[1] // k.shape[1]
    most = 2 if q.dtype == torch.float32 else max(1, min(8, 1024 // padded_dim(q.shape[2])))
    return Heads(k.shape[1], group, min(most, power_of_two(group)))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def padded_dim(dim: int) -> int:
    return max(16, power_of_two(dim))


def cheaper(view: View, words: Tensor | None = None) -> View:
    """The view itself, or the same keys contiguous where the blocks use so much of their windows that gathering is dearer.

    words are those that the union was made of, where they are still alive; else they are rebuilt.
    """
    if view.union is None or not prefers_contiguous(view.union.keys.numel(), view.chunk):
        return view
    return View(view.chunk, view.windows, words=words_from_union(view.union, view.chunk) if words is None else words)


def prefers_contiguous(union_entries: int, chunk: Chunk) -> bool:
    """Whether the chunk's windows are so densely used that reading them whole beats gathering the union's entries."""
    share = union_entries / max(chunk.window_entries, 1)
    contiguous = share > CONTIGUOUS_SHARE
    if log.isEnabledFor(logging.DEBUG):
        path, rows = "words" if contiguous else "union", chunk.rows
        per_block = union_entries / chunk.num_blocks
        log.debug(
            "queries %d..%d: %.0f keys a block, %.2f of its window: %s", rows.start, rows.stop, per_block, share, path
        )
    return contiguous


def words_from_union(union: Union, chunk: Chunk) -> Tensor:
    """The union's words spread over the chunk's window -> int16 [nb, W], 0 where a block does not look. No host sync."""
    words = torch.zeros(chunk.num_blocks, chunk.width, dtype=torch.int16, device=union.keys.device)
    blocks = torch.arange(chunk.num_blocks, device=words.device)
    block = torch.repeat_interleave(blocks, union.start.diff(), output_size=union.keys.numel())
    words.view(-1).scatter_(0, block * chunk.width + (union.keys - chunk.keys.start), union.words)
    return words


def pack(views: list[View]) -> tuple[list[tuple[Chunk, int | None]], list[Tensor]]:
    """Unions or ranges -> each one's chunk and longest block (None: ranges), and the tensors of all, for save_for_backward:
    so they are freed with what else was saved, and a checkpoint drops them."""
    packed: list[tuple[Chunk, int | None]] = []
    tensors: list[Tensor] = []
    for view in views:
        union, ranges = view.union, view.ranges or ()
        packed.append((view.chunk, None if union is None else union.widest))
        tensors += (view.windows, *(ranges if union is None else (union.start, union.keys, union.words)))
    return packed, tensors


def unpack(packed: list[tuple[Chunk, int | None]], tensors: list[Tensor]) -> Iterator[View]:
    """What `pack` took apart."""
    following = iter(tensors)
    for chunk, widest in packed:
        windows, first, second = next(following), next(following), next(following)
        if widest is None:
            yield View(chunk, windows, ranges=(first, second))
        else:
            yield View(chunk, windows, union=Union(first, second, next(following), widest))
