"""What a training step really holds: one process, the trainer's Engine, and the allocator's own record of every allocation.

The record is the profiler's: each malloc and free of tensor memory with its size, so temporaries inside operators count
too, and imports do not. Weights, gradients and optimizer states are the storages of the objects that hold them;
activations are the peak between the step's beginning and its update, above what was alive at its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from keye_data.sample import Batch
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine

ALLOCATION = "[memory]"
BEGIN, UPDATE = "planner: step begins", "planner: update begins"


@dataclass(frozen=True)
class Measured:
    """Bytes. `alive`: what the allocator says is alive before the measured step, all together."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    alive: int

    @property
    def peak(self) -> int:
        return self.alive + self.activations


def measure_step(recipe: Recipe, batches: list[Batch], warm_up: int = 1) -> Measured:
    """Builds the model with random weights, takes `warm_up` steps so that optimizer states exist, and measures one more.

    One process, without data: `batches` are given. Leaves no process groups behind.
    """
    groups = plan.initialize(recipe.parallel)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            engine = Engine(recipe, groups)
            step: Any = engine.step
            for _ in range(warm_up):
                step(batches)
            update = step._update

            def marked(lm_loss: float) -> Any:
                with record_function(UPDATE):
                    pass
                return update(lm_loss)

            step._update = marked
            with record_function(BEGIN):
                pass
            step(batches)
        alive, peak = _peak_between(record, BEGIN, UPDATE)
        return Measured(**_owned(engine), activations=peak - alive, alive=alive)
    finally:
        plan.shut_down()


def _peak_between(record: profile, begin: str, end: str) -> tuple[int, int]:
    """Bytes alive at `begin`, and the most alive until `end`."""
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    times = {e.name(): e.start_ns() for e in events if e.name() in (begin, end)}
    total = before = peak = 0
    for event in events:
        if event.name() != ALLOCATION:
            continue
        total += event.nbytes()
        if event.start_ns() < times[begin]:
            before = peak = total
        elif event.start_ns() < times[end]:
            peak = max(peak, total)
    return before, peak


def _owned(engine: Engine) -> dict[str, int]:
    """Bytes of the distinct storages behind weights, gradient buffers, and fp32 masters with their moments."""
    models = [*engine.language, engine.tower]
    wrapped = [m for m in [*engine.language_ddp, engine.tower_ddp] if m is not None]
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    buffers = [b for m in wrapped for b in [*m.buffers, *m.expert_parallel_buffers]]
    states: list[torch.Tensor] = []
    for chained in engine.optimizer.chained_optimizers:
        inner = chained.optimizer
        states += [p for group in inner.param_groups for p in group["params"]]
        states += [x for state in inner.state.values() for x in state.values() if torch.is_tensor(x)]
    return {
        "weights": sum(weights.values()),
        "gradients": _bytes(b.grad_data for b in buffers),
        "optimizer": _bytes(x for x in states if x.untyped_storage()._cdata not in weights),
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def as_dict(measured: Measured) -> dict[str, int]:
    return {**asdict(measured), "peak": measured.peak}
