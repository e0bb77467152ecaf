"""The model's part of a checkpoint, in Megatron's distributed format: any layout writes it, any layout reads it.

Keys: `language_model.*` for the decoder (one entry `model`, or `model0`, `model1` ... for interleaved stages) and
`visual.*` for the vision tower. They are the same whatever the layers are built from: the extra state of linear layers
and norms, which would hold fp8 scales, differs between Transformer Engine and Megatron's own, and is left out.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import nn


def metadata() -> dict[str, Any]:
    """How optimizer states are cut: in the shape of the parameters, so that another layout can read them."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(language: list[nn.Module], tower: nn.Module | None) -> dict[str, Any]:
    """Sharded state of this rank's stages and of the tower, which every rank holds whole: rank 0 writes it.

    tower None: a language model alone.
    """
    names = ["model"] if len(language) == 1 else [f"model{i}" for i in range(len(language))]
    state = {
        name: _tensors(stage.sharded_state_dict(prefix="language_model.", metadata=metadata()))
        for name, stage in zip(names, language)
    }
    visual = {} if tower is None else _tensors(tower.sharded_state_dict(prefix="visual.", metadata=metadata()))
    for item in nested_values(visual):
        if isinstance(item, ShardedBase):
            item.replica_id = (0, 0, dist.get_rank())
    return {**state, "visual": visual}


def load_model_state(loaded: dict[str, Any], language: list[nn.Module], tower: nn.Module) -> None:
    names = ["model"] if len(language) == 1 else [f"model{i}" for i in range(len(language))]
    for name, stage in zip(names, language):
        _fill(stage, loaded[name], "language_model.")
    _fill(tower, loaded["visual"], "visual.")


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not _is_extra(key)}


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2].startswith("_extra_state")


def _fill(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    found = {key.removeprefix(prefix): value for key, value in state.items()}
    missing, unexpected = module.load_state_dict(found, strict=False)
    if wrong := [key for key in [*missing, *unexpected] if not _is_extra(key)]:
        raise RuntimeError(f"the checkpoint and the model do not agree on {', '.join(wrong)}")
