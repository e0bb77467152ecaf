"""The model inside a training checkpoint, read a parameter at a time: any layout wrote it, one process reads it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_keye.config import schema
from megatron_keye.config.model import ModelConfig
from megatron_keye.conversion.entries import Entry, entries
from megatron_keye.conversion.progress import Progress, quiet
from megatron_keye.conversion.regions import Region, Regions
from megatron_keye.errors import UserError
from megatron_keye.model.hf_stream import Lazy, Named
from megatron_keye.training import checkpoint

MASTER = "optimizer.state.param."  # before a model key: the optimizer's fp32 copy of that parameter


def locate(path: str | Path) -> Path:
    """The iteration folder meant by `path`: itself, or the newest of a checkpoints or run folder. Raises UserError."""
    path = Path(path)
    if (path / "checksums.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (found := checkpoint.newest(root)) is not None:
            return found
    raise UserError(
        f"{path} holds no complete checkpoint; give a run's folder, its checkpoints folder or an iter_* folder"
    )


class Stored:
    """Released tensors of a checkpoint. Opening it checks every file's checksum and that every parameter is there.

    dtype None: as stored. torch.float32 on a bf16 run reads the optimizer's fp32 master copies; a parameter that was
    frozen has none, and its bf16 value is all there is of it (`frozen` counts those).
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None, progress: Progress = quiet):
        self.folder, self.dtype, self.frozen = locate(path), dtype, 0
        self.sums = checkpoint.recorded(self.folder)
        self._verify(progress)
        where = str(self.folder / "model.json")
        saved = checkpoint.saved_model(self.folder)
        self.cfg: ModelConfig = schema.instance(ModelConfig, schema.typed(ModelConfig, saved, where), where)
        self.regions = Regions(self.folder)
        self._entries = entries(self.cfg)[2]
        self._check()

    def tensors(self) -> Iterator[Named]:
        """(canonical released name, tensor), layer by layer. Tensors of one parameter, asked for in turn, cost one read."""
        for entry in self._entries:
            reading = _Reading(self, entry)
            dtype = self.dtype or self.regions.dtype(entry.parts[0].key)
            for i, (name, shape) in enumerate(zip(entry.link.released, entry.released_shapes)):
                yield name, Lazy(shape, dtype, partial(reading.get, i))

    def read(self, entry: Entry) -> list[torch.Tensor]:
        """The released tensors that one parameter stands for."""
        its = [self.regions.read(self._region(part)).reshape(part.local_shape) for part in entry.parts]
        return [tensor if self.dtype is None else tensor.to(self.dtype) for tensor in entry.released(its)]

    def _verify(self, progress: Progress) -> None:
        names = sorted(self.sums)  # the order in which `verify` deals files out
        with (
            progress("checking", sum(size for _, size in self.sums.values())) as advance,
            ThreadPoolExecutor(4) as pool,
        ):
            checks = [pool.submit(checkpoint.verify, self.folder, i, len(names)) for i in range(len(names))]
            try:
                for name, check in zip(names, checks):
                    check.result()
                    advance(self.sums[name][1])
            finally:
                pool.shutdown(cancel_futures=True)

    def _region(self, part: ShardedTensor) -> Region:
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        return Region(self._source(part.key), tuple(part.global_offset), sizes)

    def _source(self, key: str) -> str:
        wants_master = self.dtype is torch.float32 and self.regions.dtype(key) is not torch.float32
        return MASTER + key if wants_master and MASTER + key in self.regions.tensors else key

    def _check(self) -> None:
        held = self.regions.tensors
        keys = [entry.parts[0].key for entry in self._entries]  # the parts of one are parts of one tensor
        if missing := list(dict.fromkeys(key for key in keys if key not in held)):
            raise UserError(
                f"{self.folder}: {missing[0]} is missing ({len(missing)} in all), so its model.json is of another model"
            )
        narrow = [key for key in keys if self.regions.dtype(key) is not torch.float32]
        if self.dtype is not torch.float32 or not narrow:
            return
        self.frozen = sum(MASTER + key not in held for key in narrow)
        if self.frozen == len(narrow):
            raise UserError(
                f"{self.folder} holds {self.regions.dtype(narrow[0])} weights and no optimizer state, so there are no "
                "fp32 values to export; leave --dtype out, or give a checkpoint of the run itself"
            )


class _Reading:
    """The tensors of one parameter: read when the first is asked for, let go when each was."""

    def __init__(self, stored: Stored, entry: Entry):
        self._stored, self._entry, self._held = stored, entry, {}  # type: Stored, Entry, dict[int, torch.Tensor]

    def get(self, i: int) -> list[torch.Tensor]:
        if i not in self._held:
            self._held = dict(enumerate(self._stored.read(self._entry)))
        return [self._held.pop(i)]
