"""Interleaved pipeline stages: a rank's parts of the model are saved and named by their place in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invariance import LOSS, NORM, recipe_for, some_rows
from launch import launch
from weights import whole_weights

from megatron_keye.config.load import recipe_yaml
from megatron_keye.conversion.stored import Stored
from megatron_keye.parallel import plan
from megatron_keye.training.checkpoint import Checkpointer, Progress, iteration_folder
from megatron_keye.training.engine import Engine

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}


def steps(engine: Engine, which: range) -> list[tuple[float, float]]:
    log = []
    for step in which:
        result = engine.step(some_rows(engine.recipe, engine.plan, step))
        engine.schedule.step(increment=1)
        log.append((result.lm_loss, result.grad_norm or 0.0))
    return log


def train(root: Path, layout: dict[str, Any], resume: bool) -> tuple[list, dict[str, torch.Tensor]]:
    """Two steps and a checkpoint, or two more from it -> (losses and norms of steps 2 and 3, weights after step 1)."""
    recipe = recipe_for("sparse", layout)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    checkpointer = Checkpointer(root, groups, recipe.model, keep=2)
    if resume:
        checkpointer.restore(iteration_folder(root, 2), engine)
    else:
        steps(engine, range(2))
        checkpointer.save(Progress(2, 8), engine, {}, recipe_yaml(recipe))
    weights = whole_weights(engine)
    return steps(engine, range(2, 4)), weights


@pytest.mark.slow  # a checkpoint written and read: its writer starts processes that import everything again
@pytest.mark.parametrize("first, then", [(INTERLEAVED, {}), ({"pipeline": 2}, INTERLEAVED)], ids=str)
def test_a_run_goes_on_in_another_layout(first: dict, then: dict, tmp_path: Path):
    """Weights bit by bit; moments too, else the next losses would differ."""
    ranks = [layout.get("pipeline", 1) for layout in (first, then)]
    (log, weights), *_ = launch(train, ranks[0], tmp_path, first, False)
    (log_then, weights_then), *_ = launch(train, ranks[1], tmp_path, then, True)
    assert weights.keys() == weights_then.keys()
    assert all(torch.equal(weights[name], weights_then[name]) for name in weights)
    released = {
        name: tensor.get().clone() for name, tensor in Stored(tmp_path).tensors()
    }  # what the conversion to a folder reads
    assert released.keys() == weights.keys()
    assert all(torch.equal(weights[name], released[name]) for name in weights)
    for (loss, norm), (loss_then, norm_then) in zip(log, log_then):
        assert loss == pytest.approx(loss_then, rel=LOSS) and norm == pytest.approx(norm_then, rel=NORM)


def layers_of() -> list[list[int]]:
    recipe = recipe_for("dense", INTERLEAVED)
    engine = Engine(recipe, plan.initialize(recipe.parallel))
    return [[layer.layer_number for layer in part.decoder.layers] for part in engine.language]


def test_each_rank_holds_every_other_part():
    assert launch(layers_of, 2) == [[[1], [3]], [[2], [4]]]
