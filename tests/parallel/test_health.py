"""What is logged of the indexers is the same in every layout, and the same on every rank of it."""

from __future__ import annotations

from functools import cache

import pytest
from invariance import recipe_for, some_rows

from megatron_keye.model.health import PER_QUERY
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine
from megatron_keye.training.health import Health
from tests.parallel.launch import launch

LAYOUTS = [
    (2, {"tensor": 2, "expert_tensor": 2}, "none"),
    (2, {"context": 2}, "none"),
    (2, {"pipeline": 2}, "none"),
    (2, {"expert": 2}, "none"),
    (1, {}, "full"),
]


def measured(mode: str, layout: dict, recompute: str) -> dict:
    recipe = recipe_for(mode, layout, model__topk=4, training__recompute=recompute, training__steps=1)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    health = Health(recipe, engine.language)
    health.before(1)
    engine.step(some_rows(recipe, groups, 0))
    found = health.after()
    assert not any(layer.probing or layer.health is not None for layer in health.layers)
    return found


@cache
def alone(mode: str) -> dict:
    (found,) = launch(lambda: measured(mode, {}, "none"), 1)
    return found


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
@pytest.mark.parametrize("world_size, layout, recompute", LAYOUTS, ids=str)
def test_every_layout_logs_the_same(mode, world_size, layout, recompute):
    expected = alone(mode)
    assert expected["dsa/probe-queries"] >= 32 and 0 < expected["dsa/recall-mass"] < 1
    first, *others = launch(lambda: measured(mode, layout, recompute), world_size)
    assert all(other == first for other in others)
    assert first.keys() == expected.keys() and len(expected) == 1 + 2 * len(PER_QUERY) + 2
    # a recomputed layer sees its queries twice
    assert first["dsa/probe-queries"] == expected["dsa/probe-queries"] * (2 if recompute == "full" else 1)
    for key in expected.keys() - {"dsa/probe-queries"}:
        flat, wanted = (_flat(x[key]) for x in (first, expected))
        # a key near the edge may be chosen otherwise where sums are rounded otherwise
        assert flat == pytest.approx(wanted, rel=1e-3, abs=1e-3), key


def _flat(value) -> list[float]:
    return [x for item in value for x in _flat(item)] if isinstance(value, list) else [value]
