"""The dry run: what a recipe comes to on so many ranks, without a GPU, without data, in one process.

What is printed is what was computed; what was not is named (NOT_ESTIMATED), never implied.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from keye_data.sample import IGNORE, Batch
from megatron_keye.config.layout import layout_errors
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.model_values import model_errors
from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.planning.estimate import Estimate, as_json, estimate, survey_stages
from megatron_keye.planning.flops import step_flops
from megatron_keye.planning.hardware import H200, Hardware
from megatron_keye.planning.picture import draw
from megatron_keye.planning.report import print_plan, write_json
from megatron_keye.planning.stages import Held, Stage, build_stages, stage_bytes, summed_over
from megatron_keye.planning.survey import planned_batch

PARTS = ("language model", "indexers", "vision encoder", "projector")
NOT_ESTIMATED = [
    "what the allocator, CUDA, NCCL and fragmentation take beside live tensors (5 GiB is a usual reserve)",
    "temporaries of the optimizer's update, when activations are gone",
    "uneven routing: experts are taken to be chosen evenly",
    "reading and decoding of data, checkpoints",
]
CONVENTION = (
    "a multiply-add counts as two; backward twice the forward, whatever is frozen; recomputation not counted; "
    "each row one document of full length, without pictures, every token but the last predicting the next"
)


def dry_run(
    recipe: Recipe,
    world_size: int,
    json_path: Path | None = None,
    picture_path: Path | None = None,
    machine: Hardware | None = H200,
) -> dict[str, Any]:
    """Print the plan of `recipe` on `world_size` ranks; the same content is returned and written to `json_path`.

    Sizes are elements or bytes, per rank where under "stages". Without a machine no step is traced: parameters and what
    is kept of them alone. Raises UserError for an impossible layout, a model that cannot be built or run, a process that
    already has process groups, or a file that cannot be written.
    """
    errors = model_errors(recipe.model) or layout_errors(recipe, world_size)
    if errors:
        raise UserError("\n".join(errors))
    result = make_plan(recipe, world_size, machine)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        print_plan(result)
        if json_path is not None:
            write_json(result, json_path)
        if picture_path is not None:
            draw(result, picture_path)
    return result


def make_plan(recipe: Recipe, world_size: int, machine: Hardware | None = None) -> dict[str, Any]:
    layout = _layout(recipe, world_size)
    stages = build_stages(recipe)
    plan = {
        "recipe": _essentials(recipe, layout),
        "layout": layout,
        "parameters": _parameters(recipe, stages),
        "stages": [_stage(stage, recipe, layout) for stage in stages],
        "flops": _flops(recipe, world_size),
        "not_estimated": NOT_ESTIMATED,
    }
    if machine is not None:
        _add_step(
            plan, estimate(recipe, world_size, stages, machine, survey_stages(recipe, world_size)), recipe, machine
        )
    return plan


def _add_step(plan: dict[str, Any], found: Estimate, recipe: Recipe, machine: Hardware) -> None:
    """Activations into the stages, and what a step takes."""
    for stage, parts, phase, flight in zip(plan["stages"], found.stages, found.peak_in, found.in_flight):
        sizes = stage["bytes"]
        sizes["activations"] = sum(parts.values())
        sizes["sum"] += sizes["activations"]
        stage |= {"activations": parts, "peak_in": phase, "micro_batches_in_flight": flight}
    batch, essentials = planned_batch(recipe), plan["recipe"]
    useful = step_flops(recipe.model, [batch]) * essentials["global_batch_size"] / essentials["micro_batch_size"]
    tokens = essentials["tokens_per_step"]
    plan["step"] = as_json(found, plan["layout"]["world_size"], machine, tokens, useful)
    plan["step"]["picture_tokens_per_row"] = (
        int(batch.grid.prod(-1).sum()) // recipe.model.merge_size**2 // len(batch.input_ids)
    )


def _essentials(recipe: Recipe, layout: dict[str, Any]) -> dict[str, Any]:
    training, rows = recipe.training, recipe.training.global_batch_size
    return {
        "name": recipe.name,
        "preset": recipe.model.preset,
        "attention_mode": recipe.model.attention_mode,
        "topk": recipe.model.topk if recipe.model.attention_mode == "sparse" else None,
        "scope": training.scope,
        "precision": training.precision,
        "recompute": training.recompute,
        "init_from": training.init_from,
        "steps": training.steps,
        "seq_length": recipe.data.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": rows,
        "micro_batches_per_step": rows // (training.micro_batch_size * layout["data"]),
        "tokens_per_step": rows * recipe.data.seq_length,
    }


def _layout(recipe: Recipe, world_size: int) -> dict[str, Any]:
    p = recipe.parallel
    return {
        "world_size": world_size,
        "pipeline": p.pipeline,
        "virtual_pipeline": p.virtual_pipeline,
        "data": world_size // (p.pipeline * p.context * p.tensor),
        "context": p.context,
        "tensor": p.tensor,
        "expert": p.expert,
        "expert_tensor": p.expert_tensor,
        "expert_data": world_size // (p.pipeline * p.expert * p.expert_tensor),
    }


def _parameters(recipe: Recipe, stages: list[Stage]) -> dict[str, Any]:
    """Of the whole model: pieces times shards, stage by stage; the vision tower, whole on every rank, counts once."""
    cfg = recipe.model
    once = [h for stage in stages for h in stage.held if h.group != "vision" or stage is stages[0]]
    whole = [replace(h, elements=h.elements * h.shards) for h in once]
    experts = sum(h.elements for h in whole if h.group == "experts")
    by_part = _by_part(whole)
    idle_experts = experts // cfg.num_experts * (cfg.num_experts - cfg.experts_per_token)
    indexers = by_part["indexers"] if cfg.attention_mode != "dense" else 0
    return {
        "by_part": by_part,
        "total": sum(by_part.values()),
        "trained": _by_part([h for h in whole if h.trained]),
        # Of a text token: the chosen experts, both embeddings whole, indexers where they run; no vision.
        "active_per_token": by_part["language model"] - idle_experts + indexers,
    }


def _stage(stage: Stage, recipe: Recipe, layout: dict[str, Any]) -> dict[str, Any]:
    trained = [h for h in stage.held if h.trained]
    memory = stage_bytes(stage, recipe, layout["world_size"])
    language = [h for h in stage.held if h.group != "vision"]
    return {
        "stage": stage.index,
        "rank": stage.index * layout["world_size"] // layout["pipeline"],
        "layers": [[chunk[0], chunk[-1]] for chunk in stage.layers],
        "parameters": _by_part(stage.held),
        "trained": _by_part(trained),
        "language_parameters_of_all_ranks": sum(h.elements * h.shards for h in language),
        "bytes": {**memory, "sum": sum(memory.values())},
        "gradients_summed_over": summed_over(recipe, layout["world_size"]),
    }


def _by_part(held: list[Held]) -> dict[str, int]:
    return {part: sum(h.elements for h in held if h.part == part) for part in PARTS}


def _flops(recipe: Recipe, world_size: int) -> dict[str, Any]:
    cfg, rows = recipe.model, recipe.training.global_batch_size
    row = full_row(recipe.data.seq_length)
    dense = step_flops(replace(cfg, attention_mode="dense"), [row])
    actual = step_flops(cfg, [row])
    frame = recipe.data.video.max_frame_tokens
    return {
        "per_step": {"dense_equivalent": rows * dense, "actual": rows * actual},
        "per_step_and_rank": {
            "dense_equivalent": rows * dense / world_size,
            "actual": rows * actual / world_size,
        },
        "largest_frame": {"tokens": frame, "flops": step_flops(cfg, [full_row(0, _grid(cfg, frame))])},
        "convention": CONVENTION,
    }


def full_row(length: int, grid: torch.Tensor | None = None) -> Batch:
    """One row that is one document of `length` tokens, and `grid` int64 [N, 2] pictures: what FLOPs are counted of."""
    stop = torch.arange(1, length + 1, dtype=torch.int32)[None]
    targets = torch.zeros(1, length, dtype=torch.int64)
    targets[:, -1:] = IGNORE
    return Batch(
        input_ids=torch.zeros_like(targets),
        targets=targets,
        position_ids=torch.zeros(3, 1, length, dtype=torch.int64),
        key_start=torch.zeros_like(stop),
        key_stop=stop,
        patches=torch.zeros(0, 3, 14, 14, dtype=torch.uint8),
        grid=torch.zeros(0, 2, dtype=torch.int64) if grid is None else grid,
    )


def _grid(cfg: ModelConfig, tokens: int) -> torch.Tensor:
    """A frame of `tokens` after the merge, one token high."""
    return torch.tensor([[cfg.merge_size, cfg.merge_size * tokens]])
