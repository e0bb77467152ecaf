"""How long a step takes: the slowest stage's micro-batches, the pipeline's bubble, pictures, gradients, the update."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_keye.config.recipe import Recipe
from megatron_keye.planning.hardware import Hardware, collective_seconds, compute_seconds, link_bytes
from megatron_keye.planning.ledger import Sent
from megatron_keye.planning.survey import Cost

POINT_TO_POINT = ("send", "recv")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on the slowest rank."""

    compute: float
    exchange: float  # collectives inside the micro-batches, waited for
    bubble: float
    vision: float  # encoding and its backward, with their exchange
    gradients: float  # summed and weights gathered again; not behind the computation
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.vision + self.gradients + self.update


def step_time(
    hw: Hardware, recipe: Recipe, world_size: int, stages: list[Cost], vision: Cost, synced: Counter[Sent], states: int
) -> StepTime:
    """stages: work and traffic of one micro-batch on each; vision: of a whole step; synced: gradients and weights; states:
    bytes of optimizer states, gradients and weights that the update reads and writes."""
    p = recipe.parallel
    data = world_size // (p.tensor * p.context * p.pipeline)
    count = recipe.training.global_batch_size // (recipe.training.micro_batch_size * data)

    def place(sent: Sent) -> tuple[int, ...]:
        """Stages are a whole stage's ranks apart; within one, ranks are as they were traced."""
        return (0, world_size // p.pipeline) if sent.what in POINT_TO_POINT else sent.ranks

    pairs = [(compute_seconds(hw, s.work), collective_seconds(hw, s.sent, place)) for s in stages]
    compute, exchange = max(pairs, key=sum)
    idle = (p.pipeline - 1) / (p.virtual_pipeline or 1)
    return StepTime(
        compute=count * compute,
        exchange=count * exchange,
        bubble=idle * (compute + exchange),
        vision=compute_seconds(hw, vision.work) + collective_seconds(hw, vision.sent),
        gradients=collective_seconds(hw, synced),
        update=states / hw.copy,
    )


def traffic(hw: Hardware, sent: Counter[Sent], world_size: int, pipeline: int) -> dict[str, dict[str, float]]:
    """Bytes that a rank passes, by kind of collective: over NVLink, over the network, and how many there are."""
    totals: dict[str, dict[str, float]] = {}
    for s, n in sent.items():
        ranks = (0, world_size // pipeline) if s.what in POINT_TO_POINT else s.ranks
        nvlink, network = link_bytes(hw, s, ranks)
        row = totals.setdefault(s.what, {"count": 0, "nvlink": 0.0, "network": 0.0})
        row["count"] += n
        row["nvlink"] += n * nvlink
        row["network"] += n * network
    return totals
