"""Experts by grouped matrix products: SequentialMLP's values, gradients, names and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import launch

import megatron_keye.model as m
from megatron_keye.model.experts import GroupedExperts
from megatron_keye.model.names import released_tensors
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine
from tests.parallel.rows import step_batches
from tests.parallel.trained import recipe_for

MINI = dict(vocab_size=256, image_token_id=254, video_token_id=255, topk=8)


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights in both forms."""
    sequential, grouped = (
        m.build_model(m.build_config("keye_mini", grouped_experts=flag, **MINI)) for flag in (False, True)
    )
    assert isinstance(grouped.language_model.decoder.layers[0].mlp.experts, GroupedExperts)
    assert not isinstance(sequential.language_model.decoder.layers[0].mlp.experts, GroupedExperts)
    return sequential, grouped


def test_values_and_gradients():
    models = pair()
    ids = torch.randint(0, 254, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = [model(ids, labels=ids) for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    by_name = []
    for model in models:
        for parameter in model.language_model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        by_name.append(dict(released_tensors(model.language_model, model.cfg)))
    assert by_name[0].keys() == by_name[1].keys()
    for name, gradient in by_name[0].items():
        torch.testing.assert_close(by_name[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    used = [n for n, g in by_name[0].items() if ".experts." in n and g.abs().max() > 0]
    assert len(used) > 50, "the experts had work"


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [5, 0, 0, 0], [0, 0, 3, 2], [1, 1, 1, 1]])
def test_experts_without_tokens(counts: list[int]):
    models = pair()
    layers = [model.language_model.decoder.layers[1].mlp.experts for model in models]
    tokens = torch.tensor(counts + [0] * 4)
    x = torch.randn(sum(counts), 64, requires_grad=True)
    probs = torch.rand(sum(counts), requires_grad=True)
    (a, _), (b, _) = (layer(x, tokens, probs) for layer in layers)
    torch.testing.assert_close(a, b)
    if len(x):
        weights = torch.randn_like(a)
        for p, q in zip(*(torch.autograd.grad(y, (x, probs), weights) for y in (a, b))):
            torch.testing.assert_close(p, q)


def grouped_recipe(layout: dict, grouped: bool, init_from: Path | None = None):
    recipe = recipe_for(layout, "fp32", init_from)
    recipe.model.grouped_experts = grouped
    return recipe


def steps(layout: dict, grouped: bool) -> list[tuple[float, float]]:
    recipe = grouped_recipe(layout, grouped)
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    results = []
    for step in range(3):
        result = engine.step(step_batches(recipe.model, groups, step, rows=4, micro_batch=1))
        engine.schedule.step(increment=1)
        results.append((result.lm_loss, result.grad_norm))
    return results


@pytest.mark.parametrize(
    "layout", [{"expert": 2}, {"tensor": 2, "expert_tensor": 2}], ids=["expert 2", "expert tensor 2"]
)
def test_trains_alike_in_layouts(layout: dict):
    one = launch(steps, 1, {}, False)[0]
    many = launch(steps, 2, layout, True)[0]
    for (loss, norm), (its_loss, its_norm) in zip(one, many):
        assert its_loss == pytest.approx(loss, rel=1e-5)
        assert its_norm == pytest.approx(norm, rel=1e-4)


def save_and_go_on(root: Path, layout: dict, grouped: bool, restore: bool) -> list[float]:
    """Train a step and save, or restore; then the losses of two further steps."""
    from megatron_keye.config.load import recipe_yaml
    from megatron_keye.training.checkpoint import Checkpointer, Progress, newest

    recipe = grouped_recipe(layout, grouped)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    checkpoints = Checkpointer(root, groups, recipe.model, keep=1)
    if restore:
        checkpoints.restore(newest(root), engine)
    else:
        engine.step(step_batches(recipe.model, groups, 0, rows=4, micro_batch=1))
        checkpoints.save(Progress(1, 4), engine, {}, recipe_yaml(recipe))
    return [engine.step(step_batches(recipe.model, groups, n, rows=4, micro_batch=1)).lm_loss for n in (1, 2)]


@pytest.mark.parametrize("first", [False, True], ids=["from sequential", "from grouped"])
def test_one_form_goes_on_from_the_checkpoint_of_the_other(tmp_path: Path, first: bool):
    layout = {"expert": 2}
    saved = launch(save_and_go_on, 2, tmp_path, layout, first, False)[0]
    assert launch(save_and_go_on, 2, tmp_path, layout, not first, True)[0] == pytest.approx(saved, rel=1e-5)
