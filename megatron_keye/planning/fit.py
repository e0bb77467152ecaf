"""Which layouts fit: a search over how the world is cut and what is recomputed, ranked by predicted tokens/s/GPU.

Layouts that the trainer refuses, or whose weights, gradients and optimizer states alone are too large, are never traced.
Of expert sizes, the two smallest that leave room are tried for each of the rest: more only exchange more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_keye.config.layout import layout_errors
from megatron_keye.config.model_values import model_errors
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.values import CHOICES, mode_errors, value_errors
from megatron_keye.errors import UserError
from megatron_keye.planning.estimate import estimate, micro_batches, survey_stages
from megatron_keye.planning.hardware import GIB, Hardware
from megatron_keye.planning.stages import Stage, build_stages, stage_bytes

RESERVE = 5 * GIB  # for CUDA, NCCL and fragmentation: assumed
SHOWN = 15
LEAST_TOKENS = 2048  # of a row on one context rank: below it the exchange of keys is all there is


@dataclass(frozen=True)
class Candidate:
    parallel: ParallelConfig
    recompute: str
    peak: int  # bytes of the fullest stage, live tensors
    tokens_per_second_and_gpu: float
    seconds: dict[str, float]  # of a step, by kind


@dataclass(frozen=True)
class Fit:
    """`fitting`: best first."""

    gpus: int
    memory: int
    fitting: list[Candidate]
    closest: Candidate | None  # the smallest of those that do not fit
    traced: int
    too_large: int  # by weights, gradients and optimizer alone
    refused: int


def fit(recipe: Recipe, gpus: int, memory: int, hw: Hardware) -> Fit:
    """Raises UserError, with the nearest miss, where nothing fits in `memory` bytes less a reserve of 5 GiB."""
    if errors := value_errors(recipe) + model_errors(recipe.model) + mode_errors(recipe):
        raise UserError("\n".join(errors))
    found: list[Candidate] = []
    counts = {"too_large": 0, "refused": 0}
    for variant, stages in _worth_tracing(recipe, gpus, memory, counts):
        try:
            found.append(_traced(variant, stages, gpus, hw))
        except UserError:
            counts["refused"] += 1
    fitting = [c for c in found if c.peak + RESERVE <= memory]
    fitting.sort(key=lambda c: -c.tokens_per_second_and_gpu)
    closest = min(found, key=lambda c: c.peak, default=None)
    if not fitting:
        raise UserError(_refusal(recipe, gpus, memory, closest))
    return Fit(gpus, memory, fitting, closest, len(found), **counts)


def _refusal(recipe: Recipe, gpus: int, memory: int, closest: Candidate | None) -> str:
    said = f"no layout of recipe {recipe.name} on {gpus} GPUs fits in {memory / GIB:.1f} GiB (of which 5 are kept free)"
    if closest is None:
        return f"{said}: none divides {gpus} ranks and {recipe.training.global_batch_size} rows, or its weights alone are too large; take more GPUs or another batch"
    return f"{said}; the nearest is {_words(closest)} with {closest.peak / GIB:.1f} GiB; take more GPUs or memory, or shorter rows"


def _traced(recipe: Recipe, stages: list[Stage], gpus: int, hw: Hardware) -> Candidate:
    found = estimate(recipe, gpus, stages, hw, survey_stages(recipe, gpus))
    kept = [sum(stage_bytes(stage, recipe, gpus).values()) for stage in stages]
    # A stage in the middle keeps no more than the first, which has the embedding as well.
    peak = max(kept[-(i == len(found.stages) - 1)] + sum(a.values()) for i, a in enumerate(found.stages))
    tokens = recipe.training.global_batch_size * recipe.data.seq_length
    return Candidate(
        recipe.parallel, recipe.training.recompute, peak, tokens / found.time.total / gpus, asdict(found.time)
    )


def _worth_tracing(
    recipe: Recipe, gpus: int, memory: int, counts: dict[str, int]
) -> Iterator[tuple[Recipe, list[Stage]]]:
    for base in _cuts(recipe, gpus):
        left = 2
        for expert in (2**i for i in range(8)):
            p = replace(base, expert=expert, expert_tensor=base.tensor if expert == 1 else 1)
            variant = replace(recipe, parallel=p)
            if layout_errors(variant, gpus):
                continue
            stages = build_stages(variant, sorted({0, p.pipeline - 1}))
            if max(sum(stage_bytes(s, variant, gpus).values()) for s in stages) + RESERVE > memory:
                counts["too_large"] += 1
                continue
            for recompute in CHOICES["training.recompute"]:
                yield replace(variant, training=replace(recipe.training, recompute=recompute)), stages
            left -= 1
            if not left:
                break


def _cuts(recipe: Recipe, gpus: int) -> Iterator[ParallelConfig]:
    """Tensor, pipeline and context sizes that the model, the rows and the batch allow, experts aside."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 3, 4, 6, 8, 12, 16):
            for context in (2**i for i in range(8)):
                p = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context)
                enough = context == 1 or recipe.data.seq_length // context >= LEAST_TOKENS
                variant = replace(recipe, parallel=replace(p, expert=1, expert_tensor=tensor))
                # A pipeline with few micro-batches stands still: twice its stages is the least worth running.
                if (
                    enough
                    and not layout_errors(variant, gpus)
                    and (pipeline == 1 or micro_batches(variant, gpus) >= 2 * pipeline)
                ):
                    yield p


def _words(c: Candidate) -> str:
    p = c.parallel
    return f"tensor {p.tensor}, context {p.context}, pipeline {p.pipeline}, expert {p.expert}, recompute {c.recompute}"


def print_fit(found: Fit, json_path: Path | None = None) -> None:
    table = Table(
        title=f"Layouts of {found.gpus} GPUs with {found.memory / GIB:.0f} GiB, best first: "
        f"{len(found.fitting)} of {found.traced} traced fit",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for name in (
        "tensor",
        "context",
        "pipeline",
        "expert",
        "expert tensor",
        "data",
        "recompute",
        "GiB",
        "tokens/s/GPU",
    ):
        table.add_column(name, justify="right")
    for c in found.fitting[:SHOWN]:
        p = c.parallel
        data = found.gpus // (p.tensor * p.context * p.pipeline)
        sizes = (p.tensor, p.context, p.pipeline, p.expert, p.expert_tensor, data, c.recompute)
        table.add_row(*map(str, sizes), f"{c.peak / GIB:.1f}", f"{c.tokens_per_second_and_gpu:,.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Not traced: {found.too_large} whose weights, gradients and optimizer alone do not fit.")
    if json_path is not None:
        _write(found, json_path)


def _write(found: Fit, path: Path) -> None:
    content: dict[str, Any] = asdict(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written ({error.strerror}); give a path in a writable folder"
        ) from error
