"""The model inside a training checkpoint, read a layer at a time: any layout wrote it, one process reads it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_keye.config import schema
from megatron_keye.config.model import ModelConfig
from megatron_keye.conversion.regions import Region, Regions
from megatron_keye.errors import UserError
from megatron_keye.model.keye import KeyeModel
from megatron_keye.model.names import Link, links
from megatron_keye.training import checkpoint
from megatron_keye.training.model_state import model_state

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

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None):
        self.folder, self.dtype, self.frozen = locate(path), dtype, 0
        checkpoint.verify(self.folder)
        where = str(self.folder / "model.json")
        saved = checkpoint.saved_model(self.folder)
        self.cfg: ModelConfig = schema.instance(ModelConfig, schema.typed(ModelConfig, saved, where), where)
        self.regions = Regions(self.folder)
        with torch.device("meta"):
            model = KeyeModel(self.cfg)
        state = model_state([model.language_model], model.visual)
        self._entries = {
            **_wanted(model.language_model, "language_model.", state["model"], self.cfg),
            **_wanted(model.visual, "visual.", state["visual"], self.cfg),
        }
        self._check()

    def __len__(self) -> int:
        return sum(len(link.released) for _, link in self._entries.values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical released name, tensor), layer by layer."""
        for _, layer in itertools.groupby(self._entries, key=_layer):
            parts = {name: _parts(self._entries[name][0]) for name in layer}
            read = self.regions.read(self._region(part) for its in parts.values() for part in its)
            for name, its in parts.items():
                link = self._entries[name][1]
                whole = torch.cat([read.pop(self._region(part)).reshape(part.local_shape) for part in its])
                for released, tensor in zip(link.released, link.split(whole)):
                    yield released, tensor if self.dtype is None else tensor.to(self.dtype)

    def _region(self, part: ShardedTensor) -> Region:
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        return Region(self._source(part.key), tuple(part.global_offset), sizes)

    def _source(self, key: str) -> str:
        wants_master = self.dtype is torch.float32 and self.regions.dtype(key) is not torch.float32
        return MASTER + key if wants_master and MASTER + key in self.regions.tensors else key

    def _check(self) -> None:
        keys = dict.fromkeys(entry.key for entry, _ in self._entries.values())
        held = self.regions.tensors
        missing = [key for key in keys if key not in held]
        if missing:
            raise UserError(
                f"{self.folder}: {missing[0]} is missing ({len(missing)} in all), so its model.json is of another model"
            )
        narrow = [e.key for e, _ in self._entries.values() if self.regions.dtype(e.key) is not torch.float32]
        if self.dtype is not torch.float32 or not narrow:
            return
        self.frozen = sum(MASTER + key not in held for key in narrow)
        if self.frozen == len(narrow):
            raise UserError(
                f"{self.folder} holds {self.regions.dtype(narrow[0])} weights and no optimizer state, so there are no "
                "fp32 values to export; leave --dtype out, or give a checkpoint of the run itself"
            )


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """What a parameter is stored as: itself, or the gate's rows and then the up projection's."""
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _wanted(
    module: nn.Module | None, prefix: str, state: dict[str, Any], cfg: ModelConfig
) -> dict[str, tuple[Any, Link]]:
    """parameter name -> (its sharded entry, its link)"""
    if module is None:
        return {}
    return {prefix + name: (state[prefix + name], link) for name, _, link in links(module, cfg)}


def _layer(name: str) -> str:
    """What is read together: a layer, or all of a module's other parameters that follow one another."""
    match = re.match(r"(.+?\.layers\.\d+)\.", name)
    return match[1] if match else name.split(".")[0]
