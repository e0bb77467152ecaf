"""What a recipe may choose without changing the result: what is computed again, how tokens travel, precision's masters.

Three steps against the plain run on one rank, with the bounds of test_invariance.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from invariance import Run, assert_same, recipe_for, run, some_rows
from launch import launch

from keye_kernels import dsa
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine

STEPS = 3
TENSOR = {"tensor": 2, "expert_tensor": 2}


@cache
def plain(mode: str) -> Run:
    return run(1, recipe_for(mode, {}), steps=STEPS)


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
@pytest.mark.parametrize("what", ["selective", "moe", "full"])
def test_recompute_changes_nothing(mode: str, what: str):
    assert_same(plain(mode), run(1, recipe_for(mode, {}, training__recompute=what), steps=STEPS))


@pytest.mark.parametrize(
    "what, layout",
    [
        ("selective", {"context": 2}),  # keys are gathered again
        ("moe", {"expert": 2}),  # tokens are sent again
        ("full", {"context": 2, "expert": 2}),
        ("full", TENSOR),
        ("full", {"pipeline": 2, "virtual_pipeline": 2}),
    ],
    ids=str,
)
def test_recompute_among_ranks(what: str, layout: dict):
    assert_same(plain("sparse"), run(2, recipe_for("sparse", layout, training__recompute=what), steps=STEPS))


def calls_of(what: str) -> tuple[int, int]:
    """How often the attention operator and the experts ran in a step of one micro-batch."""
    recipe = recipe_for("sparse", {}, training__recompute=what)
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    calls = {"attention": 0, "experts": 0}

    def count(kind: str):
        return lambda *_: calls.update({kind: calls[kind] + 1})

    for layer in engine.language[0].decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(count("attention"))
        layer.mlp.experts.register_forward_pre_hook(count("experts"))
    engine.step(some_rows(recipe, groups, 0, micro_batch=4))
    return calls["attention"], calls["experts"]


def test_what_is_computed_again():
    """Four layers: once each, and again in backward what the recipe says."""
    seen = {what: launch(calls_of, 1, what)[0] for what in ("none", "selective", "moe", "full")}
    assert seen == {"none": (4, 4), "selective": (8, 4), "moe": (4, 8), "full": (8, 8)}


@pytest.mark.parametrize("layout", [{"expert": 2}, TENSOR, {"tensor": 2, "expert": 2}, {"context": 2}], ids=str)
def test_allgather_dispatcher(layout: dict):
    assert_same(plain("sparse"), run(2, recipe_for("sparse", {**layout, "dispatcher": "allgather"}), steps=STEPS))


def selections(layout: dict) -> torch.Tensor:
    """The keys that the first layer's queries pick in the first step, of this context rank's rows."""
    picked: list[torch.Tensor] = []
    whole = dsa.dsa_attention

    def recording(*args, **kwargs):
        out, kl, indices = whole(*args, **kwargs, return_indices=True)
        picked.append(indices)
        return out, kl

    recipe = recipe_for("sparse", layout)
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    dsa.dsa_attention = recording
    try:
        engine.step(some_rows(recipe, groups, 0, micro_batch=4))
    finally:
        dsa.dsa_attention = whole
    return picked[0]


def test_selections_are_the_same_on_every_tensor_rank_and_context_shard():
    one = launch(selections, 1, {})[0]
    for rank in launch(selections, 2, TENSOR):
        assert torch.equal(one, rank)
    shards = launch(selections, 2, {"context": 2})
    quarters = one.unflatten(0, (4, 64)).split(16, dim=1)
    assert torch.equal(torch.cat([quarters[0], quarters[3]], 1).flatten(0, 1), shards[0])
    assert torch.equal(torch.cat([quarters[1], quarters[2]], 1).flatten(0, 1), shards[1])


def train_in_bf16(layout: dict, lr: float, steps: int) -> tuple[list[float], list[float], set[torch.dtype]]:
    """(losses, how far one weight of the masters has moved after each step, the masters' types)"""
    recipe = recipe_for("sparse", layout, training__precision="bf16", optimizer__lr=lr, optimizer__schedule="constant")
    engine = Engine(recipe, groups := plan.initialize(recipe.parallel))
    masters = [
        p for part in engine.optimizer.chained_optimizers for g in part.optimizer.param_groups for p in g["params"]
    ]
    first = [p.detach().clone() for p in masters]
    losses, moved = [], []
    for _ in range(steps):
        losses.append(engine.step(some_rows(recipe, groups, 0)).lm_loss)  # the same rows: they can be learnt
        moved.append(max(float((p - q).abs().max()) for p, q in zip(masters, first)))
    return losses, moved, {p.dtype for p in masters}


def test_bf16_trains_and_starts_where_fp32_does():
    """bf16 has 8 bits of mantissa: the first loss agrees to 1e-3, and the rows of the step are being learnt."""
    losses, _, _ = launch(train_in_bf16, 2, {"tensor": 2, "expert": 2}, 3e-3, 6)[0]
    assert losses[0] == pytest.approx(plain("sparse").log[0]["lm"], rel=1e-3)
    assert losses[-1] < losses[0] - 0.1


def test_fp32_masters_keep_what_bf16_would_round_away():
    """Steps of 1e-6 are nothing beside norms of 1, whose next bf16 value is 4e-3 away; the masters add them up."""
    _, moved, dtypes = launch(train_in_bf16, 1, {}, 1e-6, 4)[0]
    assert dtypes == {torch.float32}
    assert moved[0] > 0 and moved[-1] == pytest.approx(4 * moved[0], rel=0.2)
