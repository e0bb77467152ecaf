"""What a machine cannot serve is refused before anything is built, naming the key; what it would build is tested."""

from __future__ import annotations

import pytest
import torch
from invariance import recipe_for
from launch import launch

from megatron_keye.errors import UserError
from megatron_keye.parallel import plan
from megatron_keye.training import engine, machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, settings, said",
    [
        (CPU, {"model__attention_backend": "triton"}, "model.attention_backend = triton"),
        (CPU, {"parallel__dispatcher": "flex"}, "parallel.dispatcher = flex needs CUDA and DeepEP"),
        (CUDA, {"parallel__dispatcher": "flex"}, "package deep_ep"),
        (CPU, {"optimizer__offload_fraction": 0.5}, "optimizer.offload_fraction = 0.5 .* there is no GPU"),
    ],
    ids=str,
)
def test_refusals(device: torch.device, settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        machine.check_machine(recipe_for("dense", {"expert": 2}, **settings), device)


def test_what_runs_anywhere():
    machine.check_machine(recipe_for("dense", {"expert": 2, "dispatcher": "allgather"}), CPU)


def offloaded() -> list[tuple[str, float]]:
    """The optimizers behind each part, and the share they would keep on the CPU. A step of them needs a GPU."""
    recipe = recipe_for("sparse", {}, optimizer__offload_fraction=0.5, training__precision="bf16")
    engine.check_machine = lambda recipe, device: None
    made = engine.Engine(recipe, plan.initialize(recipe.parallel))
    return [
        (type(part.optimizer).__name__, part.optimizer.offload_fraction) for part in made.optimizer.chained_optimizers
    ]


def test_offload_is_megatrons_hybrid_optimizer():
    assert set(launch(offloaded, 1)[0]) == {("HybridDeviceOptimizer", 0.5)}
