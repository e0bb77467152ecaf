"""How the same rows are cut and served changes nothing: micro-batches, packing, pictures on some ranks only or nowhere.

Bounds as in test_invariance.py; the runs are shorter, for what differs shows in the first step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from invariance import ROWS, SEQ_LENGTH, Run, assert_same, recipe_for, run, some_rows
from rows import random_rows, to_batch

from keye_data.sample import Batch
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel.plan import Plan

STEPS = 3


def short(
    world_size: int, mode: str, layout: dict[str, Any], rows=some_rows, kind: dict | None = None, **settings
) -> Run:
    return run(world_size, recipe_for(mode, layout, **settings), rows, STEPS, **(kind or {}))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_are_accumulated(size: int):
    """Of 1, 2 or 4 rows; the balance loss is so heavy here that it makes up most of the gradient."""
    heavy = {"model__router_aux_loss_coeff": 100.0}
    assert_same(of_all_rows_at_once(), short(1, "sparse", {}, kind={"micro_batch": size}, **heavy))


@cache
def of_all_rows_at_once() -> Run:
    return short(1, "sparse", {}, kind={"micro_batch": ROWS}, model__router_aux_loss_coeff=100.0)


def one_document_a_row(recipe: Recipe, groups: Plan, step: int) -> list[Batch]:
    """The documents of `some_rows`, each in a row of its own. A row's pixels are those of its documents in order."""
    batches = []
    for samples, grids, pixels in random_rows(recipe.model, step, ROWS, SEQ_LENGTH, most_pictures=2, clips=1):
        for sample in samples:
            tokens = int((sample.input_ids >= recipe.model.image_token_id).sum())
            count, patches = 0, 0
            while patches < 4 * tokens:
                patches += grids[count][1] * grids[count][2]
                count += 1
            batches.append(to_batch([([sample], grids[:count], pixels[:patches])], SEQ_LENGTH))
            grids, pixels = grids[count:], pixels[patches:]
    return batches


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_packed_and_unpacked(mode: str):
    """Without the balance loss, which is taken row by row."""
    packed = short(1, mode, {}, model__router_aux_loss_coeff=0.0)
    assert_same(packed, short(1, mode, {}, one_document_a_row, model__router_aux_loss_coeff=0.0))


def first_steps_are_text(recipe: Recipe, groups: Plan, step: int) -> list[Batch]:
    return some_rows(recipe, groups, step, most_pictures=2 if step == 1 else 0)


@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"pipeline": 2}, {"tensor": 2, "expert_tensor": 2}], ids=str)
def test_steps_without_a_picture_make_the_same_calls(layout: dict):
    """The tower trains, and in two steps of three has nothing to do."""
    assert_same(text_then_pictures(), short(2, "sparse", layout, first_steps_are_text))


@cache
def text_then_pictures() -> Run:
    return short(1, "sparse", {}, first_steps_are_text)


# With 4 ranks and half of the rows without pictures, blocks 0 and 1 encode and the others have nothing to encode.
@pytest.mark.parametrize("world_size, layout", [(2, {}), (2, {"expert": 2}), (4, {"expert": 4})], ids=str)
def test_pictures_on_some_ranks_only(world_size: int, layout: dict):
    assert_same(half_of_the_rows_have_pictures(), short(world_size, "sparse", layout, kind={"bare": ROWS // 2}))


@cache
def half_of_the_rows_have_pictures() -> Run:
    return short(1, "sparse", {}, kind={"bare": ROWS // 2})


@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"pipeline": 2}, {"tensor": 2, "expert_tensor": 2}], ids=str)
def test_frozen_encoder(layout: dict):
    """Stage 0: the projector learns through a frozen language model from a frozen encoder's features."""
    assert_same(projector_alone(), short(2, "dense", layout, training__scope="projector"))


@cache
def projector_alone() -> Run:
    result = short(1, "dense", {}, training__scope="projector")
    assert {name for name, w in result.after.items() if not w.equal(result.before[name])} == {
        f"mlp_AR.{part}.{kind}" for part in ("pre_norm", "linear_1", "linear_2") for kind in ("weight", "bias")
    }
    return result
