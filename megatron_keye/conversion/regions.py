"""Any part of any tensor of a checkpoint in Megatron's distributed format, in one process and without reading the rest.

Megatron's own loader asks for all parts of a tensor at once, and it stacks every layer's experts into one tensor. Here
the stored pieces are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_keye.conversion.archives import Mapped
from megatron_keye.errors import UserError

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """`sizes` elements from `offsets` on, in every dimension of the stored tensor `key`."""

    key: str
    offsets: Offsets
    sizes: Offsets


class Regions:
    """`tensors`: key -> shape, dtype and pieces of everything that the folder holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # a pickle of many classes: it can fail in as many ways
            raise UserError(f"{folder / '.metadata'} cannot be read ({error}); use another checkpoint") from error
        self._storage, self._mapping = metadata.storage_data, Mapped()
        self._pieces: dict[str, _Pieces] = {}
        self.tensors = {k: t for k, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, region: Region) -> torch.Tensor:
        """In the stored dtype; to be read only. Raises UserError where the checkpoint does not hold all of it."""
        if region.key not in self._pieces:
            self._pieces[region.key] = _Pieces(self.tensors[region.key].chunks)
        parts = [
            (chunk, *shared) for chunk in self._pieces[region.key].near(region) if (shared := _shared(region, chunk))
        ]
        if sum(prod(size) for _, _, size in parts) != prod(region.sizes):
            raise UserError(
                f"{self.folder} holds only parts of {region.key}, or of another shape than its model.json says"
            )
        if len(parts) == 1:
            chunk, start, size = parts[0]
            return _cut(self._mapped(region.key, chunk), tuple(chunk.offsets), start, size)
        whole = torch.empty(region.sizes, dtype=self.dtype(region.key))
        for chunk, start, size in parts:
            part = _cut(self._mapped(region.key, chunk), tuple(chunk.offsets), start, size)
            _cut(whole, region.offsets, start, size).copy_(part)
        return whole

    def _mapped(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._storage[MetadataIndex(key, chunk.offsets)]
        return self._mapping.tensor(self.folder / place.relative_path, place.offset, place.length)


class _Pieces:
    """Pieces of a tensor by where they lie in those dimensions in which every piece is one wide.

    A tensor may have thousands, of every layer and expert, and each read would look at them all.
    """

    def __init__(self, chunks: list[ChunkStorageMetadata]):
        self._all = chunks
        self._dims = [d for d in range(len(chunks[0].sizes)) if all(chunk.sizes[d] == 1 for chunk in chunks)]
        self._at: dict[Offsets, list[ChunkStorageMetadata]] = {}
        for chunk in chunks:
            self._at.setdefault(self._place(chunk.offsets), []).append(chunk)

    def near(self, region: Region) -> list[ChunkStorageMetadata]:
        """Those that can hold a part of it."""
        if any(region.sizes[d] != 1 for d in self._dims):
            return self._all
        return self._at.get(self._place(region.offsets), [])

    def _place(self, offsets: Offsets | torch.Size) -> Offsets:
        return tuple(offsets[d] for d in self._dims)


def _shared(region: Region, chunk: ChunkStorageMetadata) -> tuple[Offsets, Offsets] | None:
    """(offsets, sizes) of what the two have in common; None for nothing."""

    def ranges() -> Iterator[tuple[int, int]]:
        for a, n, b, m in zip(region.offsets, region.sizes, chunk.offsets, chunk.sizes, strict=True):
            yield max(a, b), min(a + n, b + m) - max(a, b)

    starts, sizes = zip(*ranges())
    return (starts, sizes) if min(sizes) > 0 else None


def _cut(tensor: torch.Tensor, origin: Offsets, start: Offsets, size: Offsets) -> torch.Tensor:
    """The part of `tensor`, which lies at `origin`, that begins at `start`."""
    return tensor[tuple(slice(s - o, s - o + n) for s, o, n in zip(start, origin, size))]
