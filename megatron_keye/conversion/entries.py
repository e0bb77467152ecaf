"""Every parameter of a model that holds no weights: where it lies in a checkpoint, and which released tensors make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_keye.config.model import ModelConfig
from megatron_keye.model.keye import KeyeModel
from megatron_keye.model.names import Link, links
from megatron_keye.training.model_state import model_state


@dataclass(frozen=True)
class Entry:
    name: str  # the parameter's, within its module
    parameter: nn.Parameter  # on the meta device
    link: Link
    parts: list[ShardedTensor]  # what it is stored as: itself, or the gate's rows and then the up projection's

    @cached_property
    def released_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.link.split(self.parameter.detach())]

    @cached_property
    def stored_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(part.local_shape) for part in self.parts]

    def pieces(self, released: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Released tensors -> what is stored, one for each part."""
        if [tuple(tensor.shape) for tensor in released] == self.stored_shapes:  # gate and up are stored apart too
            return released
        whole = self.link.join(released)
        return whole.split([rows for rows, *_ in self.stored_shapes]) if len(self.parts) > 1 else [whole]

    def released(self, pieces: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The way back."""
        if self.stored_shapes == self.released_shapes:
            return pieces
        return self.link.split(pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)))


def entries(cfg: ModelConfig) -> tuple[KeyeModel, dict[str, Any], list[Entry]]:
    """-> the model on the meta device, its sharded state, and its parameters in order."""
    with torch.device("meta"):
        model = KeyeModel(cfg)
    state = model_state([model.language_model], model.visual)
    found = _of(model.language_model, "language_model.", state["model"], cfg)
    if model.visual is not None:
        found += _of(model.visual, "visual.", state["visual"], cfg)
    return model, state, found


def _of(module: nn.Module, prefix: str, state: dict[str, Any], cfg: ModelConfig) -> list[Entry]:
    return [Entry(name, parameter, link, _parts(state[prefix + name])) for name, parameter, link in links(module, cfg)]


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
