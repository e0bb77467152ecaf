"""Any part of any tensor of a checkpoint in Megatron's distributed format, in one process and without reading the rest.

Megatron's own loader asks for all parts of a tensor at once, and it stacks every layer's experts into one tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_keye.errors import UserError


@dataclass(frozen=True)
class Region:
    """`sizes` elements from `offsets` on, in every dimension of the stored tensor `key`."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Regions:
    """`tensors`: key -> shape, dtype and pieces of everything that the folder holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = FileSystemReader(folder)
        try:
            metadata = self.reader.read_metadata()
        except Exception as error:  # a pickle of many classes: it can fail in as many ways
            raise UserError(f"{folder / '.metadata'} cannot be read ({error}); use another checkpoint") from error
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._pieces: dict[str, _Pieces] = {}
        self.tensors = {k: t for k, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, wanted: Iterable[Region]) -> dict[Region, torch.Tensor]:
        """Every region, in the stored dtype. Raises UserError where the checkpoint does not hold all of one."""
        targets = {region: torch.empty(region.sizes, dtype=self.dtype(region.key)) for region in wanted}
        items: list[ReadItem] = []
        for key, regions in itertools.groupby(sorted(targets, key=lambda r: r.key), key=lambda r: r.key):
            chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
            items += create_read_items_for_chunk_list(key, self._near(key, chunks), chunks)
        found = sum(prod(item.lengths) for item in items)
        if found != sum(t.numel() for t in targets.values()):
            names = ", ".join(sorted({region.key for region in targets}))
            raise UserError(f"{self.folder} holds only parts of {names}, or of another shape than its model.json says")
        self.reader.read_data(LoadPlan(items), _Into(targets)).wait()
        return targets

    def _near(self, key: str, wanted: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
        """The tensor with no other pieces than those that can hold a part of `wanted`.

        A tensor may have thousands, of every layer and expert, and each read would look at them all.
        """
        if key not in self._pieces:
            self._pieces[key] = _Pieces(self.tensors[key].chunks)
        return dataclasses.replace(self.tensors[key], chunks=self._pieces[key].near(wanted))


class _Pieces:
    """Pieces of a tensor by where they lie in those dimensions in which every piece is one wide."""

    def __init__(self, chunks: list[ChunkStorageMetadata]):
        self.all = chunks
        self.dims = [d for d in range(len(chunks[0].sizes)) if all(chunk.sizes[d] == 1 for chunk in chunks)]
        self.at: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in chunks:
            self.at.setdefault(self._place(chunk), []).append(chunk)

    def near(self, wanted: list[ChunkStorageMetadata]) -> list[ChunkStorageMetadata]:
        if any(chunk.sizes[d] != 1 for chunk in wanted for d in self.dims):
            return self.all
        places = dict.fromkeys(self._place(chunk) for chunk in wanted)
        return [chunk for place in places for chunk in self.at.get(place, [])]

    def _place(self, chunk: ChunkStorageMetadata) -> tuple[int, ...]:
        return tuple(chunk.offsets[d] for d in self.dims)


class _Into(DefaultLoadPlanner):
    def __init__(self, targets: dict[Region, torch.Tensor]):
        super().__init__()
        self.targets = {(region.key, region.offsets): tensor for region, tensor in targets.items()}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        return self.transform_tensor(read_item, self.targets[index.fqn, tuple(index.offset)])
