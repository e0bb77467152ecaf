"""Names and shapes of an exported checkpoint, put together from the shards of every rank of a layout; no weights exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_keye.config.layout import layout_errors
from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.model.hf_files import fused
from megatron_keye.model.hf_stream import lazy
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import LanguageModel
from megatron_keye.model.names import links, local_shard, released_shapes
from megatron_keye.model.transformer_config import language_config, vision_config
from megatron_keye.parallel import plan

Shape = tuple[int, ...]


def exported_shapes(preset: str, experts: str, tensor: int, expert: int, pipeline: int) -> Iterator[tuple[str, Shape]]:
    """(released name, shape) in the order of the model. Raises UserError for an impossible layout."""
    cfg = build_config(preset)
    parallel = ParallelConfig(
        tensor=tensor, expert=expert, pipeline=pipeline, expert_tensor=tensor if expert == 1 else 1
    )
    shapes = whole_shapes(cfg, parallel)
    named = ((name, lazy(torch.empty(shapes[name], device="meta"))) for name in sorted(shapes, key=_order))
    for name, value in fused(named) if experts == "fused" else named:
        yield name, value.shape


def whole_shapes(cfg: ModelConfig, parallel: ParallelConfig) -> dict[str, Shape]:
    """Canonical released name -> shape, checked to be held in full by the ranks together."""
    world_size = parallel.pipeline * lcm(parallel.tensor, parallel.expert * parallel.expert_tensor)
    recipe = Recipe(model=cfg, parallel=parallel)
    recipe.training.global_batch_size = world_size
    if errors := layout_errors(recipe, world_size):
        raise UserError("\n".join(errors))
    shapes: dict[str, Shape] = {}
    held: dict[str, set[int]] = {}  # released name -> tensor-parallel ranks that hold a shard of it
    sizes: dict[str, int] = {}  # released name -> how many there must be
    for rank in range(world_size):
        with one_of_many(parallel, rank, world_size), torch.device("meta"):
            modules: list[nn.Module] = [LanguageModel(language_config(cfg, parallel, dtype=torch.bfloat16))]
            if rank == 0 and cfg.vision_layers:  # every rank holds all of it
                modules.append(VisionTower(vision_config(cfg, dtype=torch.bfloat16), _groups_of_one()))
            for module in modules:
                for ours, parameter, link in links(module, cfg):
                    is_expert = ".experts." in ours
                    whole = released_shapes(link, parameter.shape, is_expert)
                    local = local_shard(link.join([torch.empty(shape) for shape in whole]), link, is_expert)
                    place, size = _tensor_place(is_expert)
                    for name, shape in zip(link.released, whole):
                        if shapes.setdefault(name, tuple(shape)) != tuple(shape) or local.shape != parameter.shape:
                            raise RuntimeError(f"rank {rank} holds {name} as part of {list(shape)}, not {shapes[name]}")
                        held.setdefault(name, set()).add(place)
                        sizes[name] = size if link.shard != "none" else 0
    for name, places in held.items():
        if sizes[name] and len(places) != sizes[name]:
            raise RuntimeError(f"{name}: only the tensor-parallel ranks {sorted(places)} of {sizes[name]} hold a shard")
    return shapes


@contextmanager
def one_of_many(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """Groups as `rank` of `world_size` would have them, in this process alone: collectives do nothing."""
    plan.shut_down()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    ps.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        plan.shut_down()


def _groups_of_one() -> ProcessGroupCollection:
    """The vision tower is cut by nobody."""
    groups, alone = ProcessGroupCollection(), dist.new_group([dist.get_rank()])
    for name in ("tp", "cp", "pp", "ep", "dp", "dp_cp", "tp_cp", "expt_tp", "expt_dp", "tp_ep", "tp_ep_pp", "mp"):
        setattr(groups, name, alone)
    return groups


def _tensor_place(is_expert: bool) -> tuple[int, int]:
    if is_expert:
        return ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()
    return ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()


def _order(name: str) -> list:
    """Numbers in names count as numbers, so that a layer's experts stay together and in order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
