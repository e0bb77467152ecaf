"""The vision tower's half of a step: what travels, what is computed how often, and steps without pictures."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from launch import launch
from rows import step_batches

from megatron_keye.config.model import build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine


def step(layout: dict, scope: str, pictures: int) -> dict:
    """One step of this rank -> rows it sent in each exchange with its block, and how often encoder and projector ran."""
    recipe = Recipe(parallel=ParallelConfig(**layout))
    recipe.model = build_config(
        "keye_mini", vocab_size=256, image_token_id=254, video_token_id=255, num_layers=2, topk=8
    )
    recipe.model.attention_mode = "warmup" if scope == "indexers" else "dense"
    recipe.training.precision, recipe.training.scope = "fp32", scope
    recipe.training.vision_chunk_patches = 40
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    sent: list[int] = []
    ran = {"encoder": 0, "projector": 0}
    whole = dist.all_to_all_single

    def counting(output, input, *args, group=None, **kwargs):
        if group is groups.block:
            sent.append(len(input))
        return whole(output, input, *args, group=group, **kwargs)

    for name, module in (("encoder", engine.tower.vision_model), ("projector", engine.tower.projector)):
        module.register_forward_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
    batches = step_batches(recipe.model, groups, 0, most_pictures=pictures)
    dist.all_to_all_single = counting
    try:
        result = engine.step(batches)
    finally:
        dist.all_to_all_single = whole
    assert result.finite
    tokens = sum(int(b.grid.prod(-1).sum()) // 4 for b in batches)
    return {"sent": sent, **ran, "tokens": tokens}


LAYOUTS = {"context 2": {"context": 2}, "tensor 2": {"tensor": 2, "expert_tensor": 2}, "pipeline 2": {"pipeline": 2}}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_embedding_travels_once_and_its_gradient_comes_back(name: str):
    ranks = launch(step, 2, LAYOUTS[name], "all_but_indexers", 2)
    there, back = ([rank["sent"][i] for rank in ranks] for i in (0, 1))
    assert sum(there) == sum(back) == ranks[0]["tokens"] > 0
    assert min(there) > 0, "both ranks encode"
    assert (min(back) == 0) is (name == "pipeline 2"), (
        "the second stage needs no embeddings, and has no gradients of them"
    )


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_step_without_pictures_makes_the_same_exchanges(pictures: int):
    ranks = launch(step, 2, {"context": 2}, "all_but_indexers", pictures)
    assert [len(rank["sent"]) for rank in ranks] == [2, 2]
    assert (sum(ranks[0]["sent"]) == 0) is (pictures == 0)


@pytest.mark.parametrize(
    ("scope", "encoder", "projector"),
    [("all_but_indexers", 2, 2), ("projector", 1, 2), ("indexers", 1, 1)],
    ids=["trained", "encoder frozen", "all frozen"],
)
def test_what_is_frozen_is_not_computed_again(scope: str, encoder: int, projector: int):
    found = launch(step, 1, {}, scope, 2)[0]
    trained = launch(step, 1, {}, "all_but_indexers", 2)[0]
    chunks = trained["encoder"] // 2
    assert chunks > 1
    assert (found["encoder"], found["projector"]) == (encoder * chunks, projector * chunks)
