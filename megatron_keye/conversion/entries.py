"""Every parameter of a model that holds no weights: where it lies in a checkpoint, and which released tensors make it."""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def released_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.link.split(self.parameter.detach())]


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
