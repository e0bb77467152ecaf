"""Every parallel layout trains the same model: losses, gradient norms and indexer losses equal the one-process run's.

fp32; relative tolerance 1e-5 on losses. Adam's epsilon is 1e-6, so that the rounding noise of a gradient near zero is not
blown up to a full step. With top-k smaller than the documents, later steps may part when rounding flips a pick.
"""

from __future__ import annotations

import pytest
import torch
from launch import launch
from rows import step_batches

from megatron_keye.config.model import build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine

LAYOUTS = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2, "expert_tensor": 2}),
    "expert 2": (2, {"expert": 2}),
    "context 2": (2, {"context": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
}
MODES = {"dense": ("all_but_indexers", 20), "warmup": ("indexers", 8), "sparse": ("all", 8)}


def recipe_for(mode: str, scope: str, layout: dict, recompute: str = "none") -> Recipe:
    recipe = Recipe()
    recipe.model = build_config(
        "keye_mini", attention_mode=mode, vocab_size=256, image_token_id=254, video_token_id=255, topk=8
    )
    recipe.parallel = ParallelConfig(**layout)
    recipe.training.precision = "fp32"
    recipe.training.scope = scope
    recipe.training.recompute = recompute
    recipe.training.vision_chunk_patches = 40  # several chunks a step
    recipe.optimizer.lr, recipe.optimizer.eps = 1e-3, 1e-6
    return recipe


def train(
    mode: str,
    scope: str,
    steps: int,
    layout: dict,
    recompute: str = "none",
    micro_batch: int = 2,
    balance: float = 0.001,
) -> list[dict]:
    recipe = recipe_for(mode, scope, layout, recompute)
    recipe.model.router_aux_loss_coeff = balance
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    results = []
    for step in range(steps):
        result = engine.step(step_batches(recipe.model, groups, step, micro_batch=micro_batch))
        engine.schedule.step(increment=1)
        results.append({"lm": result.lm_loss, "norm": result.grad_norm, **result.extra})
    return results


_reference: dict[str, list[dict]] = {}


def reference(mode: str) -> list[dict]:
    if mode not in _reference:
        scope, steps = MODES[mode]
        _reference[mode] = launch(train, 1, mode, scope, steps, {})[0]
    return _reference[mode]


def assert_equal(expected: list[dict], got: list[dict]) -> None:
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert a["lm"] == pytest.approx(b["lm"], rel=1e-5), f"loss of step {step}"
        # norms and auxiliary losses are sums of many small terms: a looser bound, still far below any real difference
        for key in a.keys() - {"lm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), f"{key} of step {step}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(mode: str, name: str):
    scope, steps = MODES[mode]
    world_size, layout = LAYOUTS[name]
    results = launch(train, world_size, mode, scope, steps, layout)
    assert all(r == results[0] for r in results[1:]), "ranks disagree on what they log"
    assert_equal(reference(mode), results[0])


def test_the_comparison_can_fail():
    expected = reference("sparse")
    other = [{**r, "lm": r["lm"] * (1 + 3e-5)} for r in expected]
    with pytest.raises(AssertionError):
        assert_equal(expected, other)


def test_micro_batch_size_changes_nothing():
    """The balance loss is so heavy here that it makes up most of the gradient."""
    one, four = (launch(train, 1, "sparse", "all", 3, {}, "none", rows, 100.0)[0] for rows in (1, 4))
    assert_equal(one, four)


def test_full_recompute_changes_nothing():
    for mode in ("warmup", "sparse"):
        scope, _ = MODES[mode]
        assert_equal(reference(mode)[:3], launch(train, 1, mode, scope, 3, {}, "full")[0])


def test_projector_alone_with_context_shards_that_hold_no_picture():
    one = launch(train, 1, "dense", "projector", 3, {})[0]
    assert_equal(one, launch(train, 2, "dense", "projector", 3, {"context": 2})[0])


def selections(layout: dict) -> torch.Tensor:
    """The keys that the first layer's queries pick in the first step, of this context rank's rows."""
    from keye_kernels import dsa

    picked: list[torch.Tensor] = []
    whole = dsa.dsa_attention

    def recording(*args, **kwargs):
        picked.append(dsa.select_topk(*args[3:6], args[6], args[7], args[8]))
        return whole(*args, **kwargs)

    recipe = recipe_for("sparse", "all", layout)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    dsa.dsa_attention = recording
    try:
        engine.step(step_batches(recipe.model, groups, 0, rows=2))
    finally:
        dsa.dsa_attention = whole
    return picked[0]


def test_selections_are_the_same_on_every_tensor_rank_and_context_shard():
    one = launch(selections, 1, {})[0]
    for rank in launch(selections, 2, {"tensor": 2, "expert_tensor": 2}):
        assert torch.equal(one, rank)
    shards = launch(selections, 2, {"context": 2})
    rows = one.unflatten(0, (2, 64))
    quarters = rows.split(16, dim=1)
    assert torch.equal(torch.cat([quarters[0], quarters[3]], 1).flatten(0, 1), shards[0])
    assert torch.equal(torch.cat([quarters[1], quarters[2]], 1).flatten(0, 1), shards[1])


def train_on_text(layout: dict) -> list[float]:
    recipe = recipe_for("sparse", "all", layout)
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    results = []
    for step, pictures in enumerate((0, 2, 0)):
        results.append(engine.step(step_batches(recipe.model, groups, step, most_pictures=pictures)).lm_loss)
        engine.schedule.step(increment=1)
    return results


def test_steps_without_a_picture_make_the_same_calls():
    one = launch(train_on_text, 1, {})[0]
    for layout in ({"context": 2}, {"pipeline": 2}):
        assert launch(train_on_text, 2, layout)[0] == pytest.approx(one, rel=1e-5)


def train_in_bf16() -> list[float]:
    recipe = recipe_for("sparse", "all", {"tensor": 2, "expert": 2})
    recipe.training.precision = "bf16"
    recipe.optimizer.lr = 3e-3
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    results = []
    for _ in range(6):
        results.append(engine.step(step_batches(recipe.model, groups, 0)).lm_loss)  # the same rows: they can be learnt
        engine.schedule.step(increment=1)
    return results


def test_bf16_trains_and_starts_where_fp32_does():
    """bf16 has 8 bits of mantissa: the first loss agrees to 1e-3, and the rows of the step are being learnt."""
    losses = launch(train_in_bf16, 2)[0]
    assert losses[0] == pytest.approx(reference("sparse")[0]["lm"], rel=1e-3)
    assert losses[-1] < losses[0] - 0.1
