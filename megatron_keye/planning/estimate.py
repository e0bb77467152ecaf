"""Of every pipeline stage: activations at their peak and by part, what is sent, and the time of a step, from traced stages."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from megatron_keye.config.recipe import Recipe
from megatron_keye.planning.hardware import Hardware
from megatron_keye.planning.ledger import Sent
from megatron_keye.planning.stages import Stage
from megatron_keye.planning.step_time import StepTime, step_time, traffic
from megatron_keye.planning.survey import PIXELS, Cost, Survey, summed, survey

OTHER = "gradients of activations, embeddings of pictures"


@dataclass(frozen=True)
class Estimate:
    """`stages`: activation bytes by part at each stage's peak. `issued`: floating-point operations of the slowest rank."""

    stages: list[dict[str, int]]
    peak_in: list[str]  # the phase of the step in which each stage's peak is
    time: StepTime
    traffic: dict[str, dict[str, float]]
    issued: float
    in_flight: list[int]


def survey_stages(recipe: Recipe, world_size: int, pictures: bool = True) -> list[Survey]:
    """Of the first stage, one in the middle, and the last, as far as there are such; pictures are traced with the first."""
    traced = min(recipe.parallel.pipeline, 3)
    count = micro_batches(recipe, world_size)
    return [survey(recipe, count, traced, i, pictures and i == 0) for i in range(traced)]


def estimate(recipe: Recipe, world_size: int, stages: list[Stage], hw: Hardware, surveys: list[Survey]) -> Estimate:
    """stages: what each holds (stages.py); surveys: what each does."""
    p, cfg = recipe.parallel, recipe.model
    count = micro_batches(recipe, world_size)
    flights = [in_flight(i, p.pipeline, p.virtual_pipeline, count) for i in range(p.pipeline)]
    layers = cfg.num_layers // p.pipeline
    seen = [surveys[_role(i, p.pipeline)] for i in range(p.pipeline)]
    costs = [s.stage(layers, 1) for s in seen]
    first, virtual = surveys[0], p.virtual_pipeline or 1
    # In a longer pipeline than was traced, more ranks share the pictures.
    encoded = count * first.block / (p.tensor * p.context * p.pipeline)
    encode, backward = first.vision(cfg.vision_layers, encoded)
    for cost in (encode, backward):
        cost.memory[PIXELS] += round(first.pixels * (count - encoded))
    vision = encode.plus(backward)
    peaks = []
    for index, survey_ in enumerate(seen):
        # With interleaving, what waits went through chunks of layers without embedding or head, mostly.
        waits = surveys[min(1, len(surveys) - 1)] if virtual > 1 and p.pipeline > 2 else survey_
        waiting = (flights[index] - 1) * waits.waiting(layers // virtual)
        language = survey_.stage(layers // virtual, count, waiting)
        phases = {"language": language}
        if index == 0:
            phases |= {"encode": encode, "vision backward": backward}
        else:  # no embeddings here, but the tower's share of the pictures all the same
            language.memory[PIXELS] += first.pixels * count
            alone = first.vision_backward.plus(first.vision_backward_layer, cfg.vision_layers - 1)
            alone.memory[PIXELS] += first.pixels * max(count - first.vision_batches, 0)
            phases["vision backward"] = alone
        worst = max(phases, key=lambda name: phases[name].peak)
        peaks.append((worst, _by_part(phases[worst].memory)))
    synced = synced_once(recipe, world_size, stages[0])
    time = step_time(hw, recipe, world_size, costs, vision, synced, _updated(recipe, stages[0], world_size))
    slowest = max(costs, key=Cost.flops)
    sent = summed(summed(synced, vision.sent, 1), slowest.sent, count)
    return Estimate(
        stages=[memory for _, memory in peaks],
        peak_in=[phase for phase, _ in peaks],
        time=time,
        traffic=traffic(hw, sent, world_size, p.pipeline),
        issued=slowest.flops() * count + vision.flops(),
        in_flight=flights,
    )


def _updated(recipe: Recipe, stage: Stage, world_size: int) -> int:
    """Bytes that the update reads and writes: its share of masters, moments and gradients, and weights."""
    share = {
        "dense": recipe.parallel.tensor,
        "experts": recipe.parallel.expert * recipe.parallel.expert_tensor,
        "vision": 1,
    }
    ranks = world_size // recipe.parallel.pipeline
    return sum(32 * h.elements * share[h.group] // ranks for h in stage.held if h.trained)


def micro_batches(recipe: Recipe, world_size: int) -> int:
    """Of one data-parallel rank in a step."""
    p = recipe.parallel
    data = world_size // (p.tensor * p.context * p.pipeline)
    return recipe.training.global_batch_size // (recipe.training.micro_batch_size * data)


def in_flight(stage: int, pipeline: int, virtual: int | None, count: int) -> int:
    """Micro-batches, or with interleaving passes through a chunk of layers, that wait for their backward at most."""
    if virtual is None:
        return min(count, pipeline - stage)
    return min(count * virtual, 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1)


def synced_once(recipe: Recipe, world_size: int, stage: Stage) -> Counter[Sent]:
    """Once a step: gradients, in fp32, are summed and dealt out, and weights come back; over the ranks that hold the same."""
    p = recipe.parallel
    ranks = world_size // p.pipeline
    groups = {
        "dense": range(0, ranks, p.tensor),
        "experts": range(0, ranks, p.expert * p.expert_tensor),
        "vision": range(world_size),
    }
    sent: Counter[Sent] = Counter()
    for name, members in groups.items():
        held = [h for h in stage.held if h.trained and h.group == name]
        if held and len(members) > 1:
            sent[Sent("reduce_scatter", tuple(members), 4 * sum(h.elements for h in held))] += 1
            sent[Sent("allgather", tuple(members), sum(h.elements * h.element_size for h in held))] += 1
    return sent


def _role(index: int, pipeline: int) -> int:
    """Which of the traced stages (first, between, last) is like stage `index`."""
    if index == 0:
        return 0
    return min(pipeline, 3) - 1 if index == pipeline - 1 else 1


def _by_part(memory: Counter[str]) -> dict[str, int]:
    found = {place or OTHER: round(size) for place, size in memory.items() if round(size)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def as_json(e: Estimate, world_size: int, hw: Hardware, tokens: int, useful: float) -> dict[str, Any]:
    """`useful`: floating-point operations of the step over all ranks, none of them recomputed."""
    seconds = e.time.total
    return {
        "machine": hw.name,
        "seconds": {**asdict(e.time), "total": seconds},
        "tokens_per_second_and_gpu": tokens / seconds / world_size,
        "tflops_per_gpu": useful / seconds / world_size / 1e12,
        "mfu": useful / seconds / world_size / hw.peak,
        "issued_flops_per_rank": e.issued,
        "bubble": e.time.bubble / seconds,
        "traffic": e.traffic,
    }
