"""What is outside the scope does not change by a bit and has no optimizer state; what is inside does change."""

from __future__ import annotations

import pytest
import torch
from invariance import recipe_for
from launch import launch
from rows import step_batches

from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine
from megatron_keye.training.scope import is_trained


def train(scope: str, mode: str) -> tuple[list[str], list[str], int, int]:
    """(changed though frozen, unchanged though trained, elements with optimizer state, elements that train)"""
    recipe = recipe_for(mode, {}, training__scope=scope)
    recipe.optimizer.weight_decay = 0.5  # would move a parameter that had no gradient at all
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    named = [(f"language_model.{n}", p) for n, p in engine.language[0].named_parameters()]
    named += [(f"visual.{n}", p) for n, p in engine.tower.named_parameters()]
    before = {n: p.detach().clone() for n, p in named}
    for step in range(2):
        assert engine.step(step_batches(recipe.model, groups, step)).finite
        engine.schedule.step(increment=1)
    changed = {n for n, p in named if not torch.equal(before[n], p)}
    frozen_changed = [n for n in changed if not is_trained(n, scope)]
    trained_unchanged = [n for n, _ in named if is_trained(n, scope) and n not in changed]
    states = sum(s["exp_avg"].numel() for o in engine.optimizer.chained_optimizers for s in o.optimizer.state.values())
    return frozen_changed, trained_unchanged, states, sum(p.numel() for n, p in named if is_trained(n, scope))


@pytest.mark.parametrize(
    ("scope", "mode"),
    [
        ("projector", "dense"),
        ("all_but_indexers", "dense"),
        ("indexers", "warmup"),
        ("indexers", "sparse"),
        ("all", "sparse"),
    ],
)
def test_scope_is_kept(scope: str, mode: str):
    frozen_changed, trained_unchanged, states, trained = launch(train, 1, scope, mode)[0]
    assert frozen_changed == []
    assert trained_unchanged == []
    assert states == trained
