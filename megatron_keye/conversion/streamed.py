"""Megatron's distributed format written as a stream: memory holds the parameter at hand, not the model.

Megatron writes what it is given whole; given tensors without storage (the meta device) and this strategy, it writes all
else as ever (common.pt, metadata.json), and the values come one parameter at a time from `pieces`. Any layout reads it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_keye.conversion.archives import around
from megatron_keye.conversion.entries import Entry
from megatron_keye.journal import Advance, Journal, Summed, ahead

FILE_BYTES = 2_000_000_000
ALIGNED = 64  # where pieces begin, so that their values can be mapped


class Streamed(SaveShardedStrategy):
    """`pieces(entry)` gives what a parameter of ours is stored as, in the dtype that `dtypes` announces for its key."""

    def __init__(
        self,
        entries: Sequence[Entry],
        dtypes: dict[str, torch.dtype],
        pieces: Callable[[Entry], Sequence[torch.Tensor]],
        journal: Journal,
        advance: Advance,
        file_bytes: int = FILE_BYTES,
    ):
        super().__init__("torch_dist", 1)
        self.entries, self.dtypes, self.pieces = entries, dtypes, pieces
        self.journal, self.advance, self.file_bytes = journal, advance, file_bytes

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def nbytes(self, entry: Entry) -> int:
        return entry.parameter.numel() * self.dtypes[entry.parts[0].key].itemsize

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        items = list(nested_values(sharded_state_dict))
        objects = [item for item in items if isinstance(item, ShardedObject)]
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for i, run in enumerate(self._runs(objects)):
            file = f"__0_{i}.distcp"
            record = self.journal.finished(file, self.advance)
            if record is None:
                record = []
                with self.journal.writing(file, record) as stream:
                    for archive, nbytes in ahead(self._archives(run)):
                        record.append(_write(stream, archive))
                        self.advance(nbytes)
            wheres = [where for item in run for where in _wheres(item)]
            storage |= {where: _StorageInfo(file, *place) for where, place in zip(wheres, record, strict=True)}
        metadata = Metadata(self._described(items), None, storage)
        (Path(checkpoint_dir) / ".metadata").write_bytes(pickle.dumps(metadata))

    def _runs(self, objects: list[ShardedObject]) -> Iterator[list[Entry | ShardedObject]]:
        """What each file holds: the objects, which are small, in the first."""
        run: list[Entry | ShardedObject] = [*objects]
        size = 0
        for entry in self.entries:
            nbytes = self.nbytes(entry)
            if size and size + nbytes > self.file_bytes:
                yield run
                run, size = [], 0
            run.append(entry)
            size += nbytes
        yield run

    def _archives(self, items: Sequence[Entry | ShardedObject]) -> Iterator[tuple[list[Any], int]]:
        """What torch.save would write of each piece: its bytes, in parts; and how many of them are values."""
        for item in items:
            if isinstance(item, ShardedObject):
                whole = io.BytesIO()
                torch.save([item.data], whole)
                yield [whole.getbuffer()], 0
                continue
            for part, piece in zip(item.parts, self.pieces(item), strict=True):
                if piece.shape != part.local_shape or piece.dtype is not self.dtypes[part.key]:
                    raise RuntimeError(
                        f"{part.key} is {part.local_shape}, but {list(piece.shape)} of {piece.dtype} came"
                    )
                before, after = around(_sizes(part), piece.dtype)
                yield [before, piece.contiguous().flatten().view(torch.uint8).numpy(), after], piece.nbytes

    def _described(self, items: list[ShardedTensor | ShardedObject]) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for item in items:
            if isinstance(item, ShardedObject):
                described[item.unique_key] = BytesStorageMetadata()
                continue
            whole = described.setdefault(
                item.key,
                TensorStorageMetadata(TensorProperties(self.dtypes[item.key]), torch.Size(item.global_shape), []),
            )
            whole.chunks.append(ChunkStorageMetadata(torch.Size(item.global_offset), torch.Size(_sizes(item))))
        return described


def _write(stream: Summed, archive: Sequence[Any]) -> list[int]:
    """-> [offset, length]"""
    stream.write(bytes(-stream.size % ALIGNED))
    start = stream.size
    for part in archive:
        stream.write(part)
    return [start, stream.size - start]


def _sizes(part: ShardedTensor) -> tuple[int, ...]:
    """Of the stored piece: layers and experts are dimensions there."""
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


def _wheres(item: Entry | ShardedObject) -> list[MetadataIndex]:
    if isinstance(item, ShardedObject):
        return [MetadataIndex(item.unique_key)]
    return [MetadataIndex(part.key, torch.Size(part.global_offset)) for part in item.parts]
