"""A run that goes on from a checkpoint obeys the recipe as it is now, not as it was when the checkpoint was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import launch
from rows import step_batches
from trained import recipe_for

from megatron_keye.config.load import recipe_yaml
from megatron_keye.errors import UserError
from megatron_keye.parallel import plan
from megatron_keye.training.checkpoint import Checkpointer, Progress, iteration_folder
from megatron_keye.training.engine import Engine


def settings_of(root: Path, lr: float, vision_scale: float, beta1: float, resume: bool) -> set[tuple[float, float]]:
    """(learning rate, beta1) of every group of parameters, after a step or after going on from it."""
    recipe = recipe_for({}, "fp32")
    recipe.optimizer.lr, recipe.optimizer.beta1, recipe.optimizer.schedule = lr, beta1, "constant"
    recipe.optimizer.vision_lr_scale = vision_scale
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    checkpointer = Checkpointer(root, groups, recipe.model, keep=2)
    if resume:
        checkpointer.restore(iteration_folder(root, 1), engine)
    else:
        engine.step(step_batches(recipe.model, groups, 0, rows=2))
        engine.schedule.step(increment=1)
        checkpointer.save(Progress(1, 2), engine, {}, recipe_yaml(recipe))
    return {(group["lr"], group["betas"][0]) for group in engine.optimizer.param_groups}


def test_learning_rate_and_betas_are_those_of_the_recipe(tmp_path: Path):
    (before,) = launch(settings_of, 1, tmp_path, 1e-3, 0.5, 0.9, False)
    assert before == {(1e-3, 0.9), (5e-4, 0.9)}
    (after,) = launch(settings_of, 1, tmp_path, 1e-4, 0.25, 0.8, True)
    assert after == {(1e-4, 0.8), (2.5e-5, 0.8)}


def save_where_a_file_stands(root: Path) -> str:
    recipe = recipe_for({"expert": 2}, "fp32")
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    with pytest.raises(UserError) as caught:
        Checkpointer(root, groups, recipe.model, keep=2).save(Progress(1, 2), engine, {}, recipe_yaml(recipe))
    return str(caught.value)


def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("in the way")
    first, second = launch(save_where_a_file_stands, 2, tmp_path / "checkpoints", timeout=60)
    assert first == second and "could not be written" in first and "no earlier checkpoint" in first
