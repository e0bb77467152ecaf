"""Padding at the end of a row goes to no expert, weighs in no loss, is counted nowhere and learns nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from invariance import ROWS, recipe_for, some_rows
from launch import launch

from keye_data.sample import IGNORE, Batch
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel import plan
from megatron_keye.parallel.plan import Plan
from megatron_keye.training.engine import Engine

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dispatcher": "allgather"},
    {"tensor": 2, "expert_tensor": 2},
    {"context": 2},
    {"expert": 2},
]


def rows_with(recipe: Recipe, groups: Plan, fill: int, extra: int) -> list[Batch]:
    """Rows of the first step, longer by `extra` columns of padding, with token `fill` and odd positions on all padding."""
    batches = []
    for batch in some_rows(recipe, groups, 0):
        longer = {
            name: torch.nn.functional.pad(getattr(batch, name), (0, extra), value=value)
            for name, value in (
                ("input_ids", 0),
                ("targets", IGNORE),
                ("position_ids", 0),
                ("key_start", 64),
                ("key_stop", 64),
            )
        }
        padding = longer["key_start"] == longer["key_stop"]
        longer["input_ids"][padding] = fill
        longer["position_ids"][:, padding] = fill
        batches.append(replace(batch, **longer))
    return batches


def step(layout: dict, fill: int, extra: int) -> tuple[dict[str, Any], int]:
    """(what the step logs, how many tokens this rank's experts computed)"""
    recipe = recipe_for("sparse", layout)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    computed = []
    for layer in engine.language[0].decoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: computed.append(int(args[1].sum())))
    result = engine.step(rows_with(recipe, groups, fill, extra))
    return {"lm": result.lm_loss, "norm": result.grad_norm, "tokens": result.tokens, **result.extra}, sum(computed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_content_and_amount_of_padding_change_nothing(layout: dict):
    ranks = 1 if layout.keys() <= {"dispatcher"} else 2
    short, long = (launch(step, ranks, layout, fill, extra)[0][0] for fill, extra in ((0, 0), (77, 64)))
    assert short["tokens"] == long["tokens"]
    for key in short:
        assert short[key] == pytest.approx(long[key], rel=1e-5), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_compute_real_tokens_alone(layout: dict):
    ranks = 1 if layout.keys() <= {"dispatcher"} else 2
    results = launch(step, ranks, layout, 0, 64)
    config = recipe_for("sparse", layout).model
    real = {r[0]["tokens"] for r in results}.pop()
    assert real < ROWS * 64, "the rows have no padding to leave out"
    # Tensor ranks that share an expert each count its tokens.
    shared = layout.get("expert_tensor", 1)
    assert sum(computed for _, computed in results) == real * config.experts_per_token * config.num_layers * shared
