"""Safetensors files as a stream: the header first, then tensor after tensor, block after block.

A tensor need not exist before its turn: `Lazy` says what it will be and makes it a few rows at a time, so that memory
holds a block and not a file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_keye.journal import Advance, Summed, ahead

# As safetensors names them.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is asked for. `blocks` gives its rows, in order, some at a time.

    A block is good until the next but one is asked for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def get(self) -> torch.Tensor:
        """The whole of it, which may be the only block itself."""
        whole, at = torch.empty(0, dtype=self.dtype), 0
        for block in self.blocks():
            if tuple(block.shape) == self.shape:
                return block
            whole = whole if at else torch.empty(prod(self.shape), dtype=self.dtype)
            whole[at : at + block.numel()] = block.flatten()
            at += block.numel()
        return whole.reshape(self.shape)


Named = tuple[str, Lazy]


def lazy(tensor: torch.Tensor) -> Lazy:
    """One that exists already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: (tensor.detach(),))


def shards(tensors: Iterable[Named], size: int) -> list[list[Named]]:
    """Cut into runs of at most `size` bytes; a larger tensor has one of its own."""
    runs: list[list[Named]] = []
    room = 0
    for name, tensor in tensors:
        if not runs or (tensor.nbytes > room and room < size):
            runs.append([])
            room = size
        runs[-1].append((name, tensor))
        room -= tensor.nbytes
    return runs


def write_shard(out: Summed, tensors: Sequence[Named], advance: Advance) -> None:
    """The content of one safetensors file. Wide types come first, so that all lie at multiples of their size."""
    tensors = sorted(tensors, key=lambda named: -named[1].dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors:
        end = start + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in tensors:
        before = out.size
        for block in ahead(tensor.blocks()):
            if block.dtype is not tensor.dtype:
                raise RuntimeError(f"{name} was announced as {tensor.dtype} and came as {block.dtype}")
            advance(out.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy()))
        if out.size - before != tensor.nbytes:
            raise RuntimeError(f"{name} was announced as {list(tensor.shape)} and came as {out.size - before} bytes")


def header_of(path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every tensor that a file really holds, in the order of the file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield name, end - start
