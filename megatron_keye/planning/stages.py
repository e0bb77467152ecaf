"""What one rank of each pipeline stage holds: the trainer's own modules, built without memory in a fake process group.

Shapes therefore come from the model and not from formulas about it. Data-parallel copies change no shape, so the fake
world is the smallest that the layout fits into: the time taken does not grow with the world planned for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import lcm

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import LanguageModel
from megatron_keye.model.names import Link, links
from megatron_keye.model.transformer_config import language_config, vision_config
from megatron_keye.parallel import plan
from megatron_keye.training.engine import DTYPES
from megatron_keye.training.scope import is_trained, part_of


@dataclass(frozen=True)
class Held:
    """One parameter as a rank holds it."""

    part: str  # as in training/scope.py
    group: str  # "dense" | "experts" | "vision": its gradients are summed over that group's ranks
    elements: int  # on this rank
    shards: (
        int  # ranks that hold different pieces of the same kind: tensor parallelism and, for experts, the other experts
    )
    trained: bool
    element_size: int  # bytes


@dataclass(frozen=True)
class Stage:
    """A rank of one pipeline stage."""

    index: int
    layers: list[list[int]]  # one run of layers for each interleaved chunk, counted from 0
    held: list[Held]


def summed_over(recipe: Recipe, world_size: int) -> dict[str, int]:
    """How many ranks sum the gradients of each group of parameters, and share its optimizer states."""
    p = recipe.parallel
    return {
        "dense": world_size // (p.pipeline * p.tensor),
        "experts": world_size // (p.pipeline * p.expert * p.expert_tensor),
        "vision": world_size,
    }


def stage_bytes(stage: Stage, recipe: Recipe, world_size: int) -> dict[str, int]:
    """What a GPU keeps all the time: weights, gradients (fp32, whole), and its share of the optimizer's states."""
    trained = [h for h in stage.held if h.trained]
    return {
        "weights": sum(h.elements * h.element_size for h in stage.held),
        "gradients": sum(4 * h.elements for h in trained),
        "optimizer": sum(
            round(
                (1 - recipe.optimizer.offload_fraction)
                * optimizer_bytes([h for h in trained if h.group == group], ranks)
            )
            for group, ranks in summed_over(recipe, world_size).items()
        ),
    }


def optimizer_bytes(trained: list[Held], ranks: int) -> int:
    """AdamW's two moments in fp32, and an fp32 master of weights kept in less, divided over `ranks` (the largest share)."""
    total = sum(h.elements * (8 if h.element_size == 4 else 12) for h in trained)
    return -(-total // ranks)


def build_stages(recipe: Recipe, indices: Iterable[int] | None = None) -> list[Stage]:
    """One rank of every stage, or of those asked for.

    Raises UserError where process groups exist already or a stage cannot be built.
    """
    if dist.is_initialized():
        raise UserError("a dry run needs a process of its own: this one already has process groups; start a fresh one")
    recipe = on_a_gpu(recipe)
    return [_build_in_fake_world(recipe, index) for index in indices or range(recipe.parallel.pipeline)]


def on_a_gpu(recipe: Recipe) -> Recipe:
    """The recipe with the choices that it leaves to the machine taken as on a GPU: experts are grouped.

    What only a GPU's packages can do is planned as what it stands in for: DeepEP as the plain exchange of tokens.
    """
    model, p = recipe.model, recipe.parallel
    grouped = True if model.grouped_experts is None else model.grouped_experts
    dispatcher = "alltoall" if p.dispatcher == "flex" else p.dispatcher
    return replace(recipe, model=replace(model, grouped_experts=grouped), parallel=replace(p, dispatcher=dispatcher))


def _build_in_fake_world(recipe: Recipe, index: int) -> Stage:
    p = recipe.parallel
    world = p.pipeline * lcm(p.tensor * p.context, p.expert * p.expert_tensor)
    rank = index * (world // p.pipeline)  # the pipeline is the slowest axis: the stage's first rank
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        groups = plan.initialize(p)
        # Fake tensors rather than the meta device: they also hold where Megatron asks for the current GPU by name.
        with FakeTensorMode():
            return _build(recipe, groups, index)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(
            f"recipe {recipe.name}: Megatron-Core cannot build pipeline stage {index} of this layout ({reason}); "
            "change the parallel or model section, or see --debug"
        ) from error
    finally:
        plan.shut_down()


def _build(recipe: Recipe, groups: plan.Plan, index: int) -> Stage:
    cfg, p = recipe.model, recipe.parallel
    dtype = DTYPES[recipe.training.precision]
    config = language_config(cfg, p, dtype=dtype)
    chunks = range(p.virtual_pipeline) if p.virtual_pipeline else [None]
    language = [LanguageModel(config, vp_stage=chunk) for chunk in chunks]
    tower = VisionTower(vision_config(cfg, dtype=dtype), groups.vision)
    scope, held = recipe.training.scope, []
    for model in language:
        for name, parameter, link in links(model, cfg):
            group = "experts" if ".experts." in name else "dense"
            held.append(_held(parameter, f"language_model.{name}", group, _shards(link, group, recipe), scope))
    for name, parameter in tower.named_parameters():
        held.append(_held(parameter, f"visual.{name}", "vision", 1, scope))
    return Stage(index, [[layer.layer_number - 1 for layer in model.decoder.layers] for model in language], held)


def _held(parameter: Tensor, name: str, group: str, shards: int, scope: str) -> Held:
    """What trains is asked of the name: one of grouped experts is a slice, which knows of no gradient."""
    return Held(part_of(name), group, parameter.numel(), shards, is_trained(name, scope), parameter.element_size())


def _shards(link: Link, group: str, recipe: Recipe) -> int:
    p, is_cut = recipe.parallel, link.shard != "none"
    if group == "experts":
        return p.expert * (p.expert_tensor if is_cut else 1)
    return p.tensor if is_cut else 1
