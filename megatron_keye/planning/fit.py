"""Which layouts fit: a search over how the world is cut and what is recomputed, ranked by predicted tokens/s/GPU.

Layouts that the trainer refuses, or whose weights, gradients and optimizer states alone are too large, are never traced.
The rest goes from the least cut to the most: experts over more ranks, rows over more ranks, and stages only where no layout
without them fits. Each cut costs exchange or bubble and buys memory, so it ends where a layout fits that recomputes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
from megatron_keye.planning.report import write_json
from megatron_keye.planning.stages import Stage, build_stages, stage_bytes

RESERVE = 5 * GIB  # for CUDA, NCCL and fragmentation: assumed
SHOWN = 15
TENSOR, CONTEXT = (1, 2, 4, 8), tuple(2**i for i in range(7))
PIPELINE, EXPERT = (1, 2, 4, 8, 16), tuple(2**i for i in range(8))
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


def fit(recipe: Recipe, gpus: int, memory: int, hw: Hardware) -> Fit:
    """Raises UserError, with the nearest miss, where nothing fits in `memory` bytes less a reserve of 5 GiB."""
    if errors := value_errors(recipe) + model_errors(recipe.model) + mode_errors(recipe):
        raise UserError("\n".join(errors))
    if memory <= RESERVE:
        raise UserError(
            f"memory={memory / GIB:g}GiB leaves nothing: {RESERVE // GIB} GiB are kept free on each GPU; give more"
        )
    search = _Search(recipe, gpus, memory, hw)
    for tensor in TENSOR:
        search.contexts(tensor)
    fitting = sorted((c for c in search.found if search.fits(c)), key=lambda c: -c.tokens_per_second_and_gpu)
    closest = min(search.found, key=lambda c: c.peak, default=None)
    if not fitting:
        raise UserError(_refusal(recipe, gpus, memory, closest))
    return Fit(gpus, memory, fitting, closest, len(search.found), search.too_large)


class _Search:
    """Each method is a loop over one kind of cut; it returns whether a layout inside it fits and recomputes nothing."""

    def __init__(self, recipe: Recipe, gpus: int, memory: int, hw: Hardware):
        self.recipe, self.gpus, self.memory, self.hw = recipe, gpus, memory, hw
        self.found: list[Candidate] = []
        self.too_large = 0
        self._stages: dict[tuple, list[Stage]] = {}

    def fits(self, c: Candidate) -> bool:
        return c.peak + RESERVE <= self.memory

    def contexts(self, tensor: int) -> bool:
        sizes = [c for c in CONTEXT if c == 1 or self.recipe.data.seq_length // c >= LEAST_TOKENS]
        return any(self.pipelines(tensor, context) for context in sizes)

    def pipelines(self, tensor: int, context: int) -> bool:
        for pipeline in PIPELINE:
            before = len(self.found)
            if self.experts(tensor, context, pipeline):
                return True
            if any(self.fits(c) for c in self.found[before:]):
                break
        return False

    def experts(self, tensor: int, context: int, pipeline: int) -> bool:
        for expert in EXPERT:
            p = replace(
                self.recipe.parallel, tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=None,
                expert=expert, expert_tensor=tensor if expert == 1 else 1,
            )  # fmt: skip
            variant = replace(self.recipe, parallel=p)
            if layout_errors(variant, self.gpus) or (pipeline > 1 and micro_batches(variant, self.gpus) < 2 * pipeline):
                continue  # in a pipeline with fewer micro-batches the stages stand still for a third of the time
            stages = self._built(variant)
            if max(sum(stage_bytes(s, variant, self.gpus).values()) for s in stages) + RESERVE > self.memory:
                self.too_large += 1
                continue
            if self.recomputes(variant, stages):
                return True
            if any(self.fits(c) for c in self.found if c.parallel == p):
                return False  # more ranks for the experts would only exchange more
        return False

    def recomputes(self, variant: Recipe, stages: list[Stage]) -> bool:
        """Everything first: where that is too large, less recomputation is as well."""
        for recompute in ("full", "none", *(set(CHOICES["training.recompute"]) - {"full", "none"})):
            candidate = self.trace(replace(variant, training=replace(variant.training, recompute=recompute)), stages)
            if candidate is None or (recompute == "full" and not self.fits(candidate)):
                return False
            if recompute == "none" and self.fits(candidate):
                return True
        return False

    def trace(self, recipe: Recipe, stages: list[Stage]) -> Candidate | None:
        """None where Megatron-Core refuses the layout."""
        try:
            found = estimate(recipe, self.gpus, stages, self.hw, survey_stages(recipe, self.gpus))
        except UserError:
            return None
        kept = [sum(stage_bytes(stage, recipe, self.gpus).values()) for stage in stages]
        # A stage in the middle keeps no more than the first, which has the embedding as well.
        peak = max(kept[-(i == len(found.stages) - 1)] + sum(a.values()) for i, a in enumerate(found.stages))
        speed = recipe.training.global_batch_size * recipe.data.seq_length / found.time.total / self.gpus
        if sys.stderr.isatty():
            print(f"{len(self.found) + 1} layouts traced", end="\r", file=sys.stderr)
        self.found.append(Candidate(recipe.parallel, recipe.training.recompute, peak, speed, asdict(found.time)))
        return self.found[-1]

    def _built(self, recipe: Recipe) -> list[Stage]:
        """The first stage and the last. Context parallelism changes nothing in them."""
        p = recipe.parallel
        key = (p.tensor, p.pipeline, p.expert, p.expert_tensor)
        if key not in self._stages:
            alone = replace(recipe, parallel=replace(p, context=1))
            self._stages[key] = build_stages(alone, sorted({0, p.pipeline - 1}))
        return self._stages[key]


def _refusal(recipe: Recipe, gpus: int, memory: int, closest: Candidate | None) -> str:
    said = f"no layout of recipe {recipe.name} on {gpus} GPUs fits in {memory / GIB:.1f} GiB (of which 5 are kept free)"
    if closest is None:
        return f"{said}: none divides {gpus} ranks and {recipe.training.global_batch_size} rows, or its weights alone are too large; take more GPUs or another batch"
    return f"{said}; the nearest is {_words(closest)} with {closest.peak / GIB:.1f} GiB; take more GPUs or memory, or shorter rows"


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
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=110)
    console.print(table)
    console.print(f"Not traced: {found.too_large} whose weights, gradients and optimizer alone do not fit.")
    if json_path is not None:
        write_json(asdict(found), json_path)
