"""Any part of any tensor of a checkpoint in Megatron's distributed format, in one process and without reading the rest.

Megatron's own loader asks for all parts of a tensor at once, and it stacks every layer's experts into one tensor.
"""

from __future__ import annotations

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
        self.tensors = {k: t for k, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, wanted: Iterable[Region]) -> dict[Region, torch.Tensor]:
        """Every region, in the stored dtype. Raises UserError where the checkpoint does not hold all of one."""
        targets = {region: torch.empty(region.sizes, dtype=self.dtype(region.key)) for region in wanted}
        items: list[ReadItem] = []
        for key, regions in itertools.groupby(sorted(targets, key=lambda r: r.key), key=lambda r: r.key):
            chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
            items += create_read_items_for_chunk_list(key, self.tensors[key], chunks)
        found = sum(prod(item.lengths) for item in items)
        if found != sum(t.numel() for t in targets.values()):
            names = ", ".join(sorted({region.key for region in targets}))
            raise UserError(f"{self.folder} holds only parts of {names}, or of another shape than its model.json says")
        self.reader.read_data(LoadPlan(items), _Into(targets)).wait()
        return targets


class _Into(DefaultLoadPlanner):
    def __init__(self, targets: dict[Region, torch.Tensor]):
        super().__init__()
        self.targets = {(region.key, region.offsets): tensor for region, tensor in targets.items()}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        return self.transform_tensor(read_item, self.targets[index.fqn, tuple(index.offset)])
