"""Every recipe at 8 to 4,096 ranks: a whole plan or one clear refusal, no parameter lost or counted twice, and what it says it fits."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_keye.config.load import load_recipe
from megatron_keye.config.validate import validate
from megatron_keye.errors import UserError
from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.dry_run import make_plan
from megatron_keye.planning.fit import RESERVE
from megatron_keye.planning.hardware import GIB, H200

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if "\nmodel:" in path.read_text()]  # a curriculum lists phases and has no model
TRAINED = {
    "projector": {"projector"},
    "all_but_indexers": {"language model", "vision encoder", "projector"},
    "indexers": {"indexers"},
    "all": {"language model", "indexers", "vision encoder", "projector"},
}


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()
    yield
    assert not dist.is_initialized()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_mini_has_a_plan(path):
    recipe = load_recipe(path, ["profile=mini"])
    assert validate(recipe, 2) == []
    plan = make_plan(recipe, 2, None)
    assert plan["recipe"]["name"] == f"{path.stem}-mini" and plan["recipe"]["preset"] == "keye_mini"
    assert plan["layout"]["data"] == 2 and plan["stages"][0]["bytes"]["sum"] < GIB
    assert {part for part, count in plan["parameters"]["trained"].items() if count} == TRAINED[recipe.training.scope]


@pytest.mark.slow  # three plans of the full model a recipe, two seconds each
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("where", [8, "stated", 4096])
def test_plan_or_refusal(path, where):
    recipe = load_recipe(path)
    ((gpus, memory),) = re.findall(r"\((\d+) GPUs of (\d+) GiB;", path.read_text())
    world_size = int(gpus) if where == "stated" else where
    try:
        validate(recipe, world_size)
    except UserError as error:
        assert where != "stated" and "nearest is" in str(error)
        return
    began = time.process_time()
    plan = make_plan(recipe, world_size, H200)
    assert time.process_time() - began < 60
    parameters, stages = plan["parameters"], plan["stages"]
    language = parameters["by_part"]["language model"] + parameters["by_part"]["indexers"]
    assert sum(stage["language_parameters_of_all_ranks"] for stage in stages) == language
    assert parameters["total"] == 31_122_082_160
    for stage in stages:
        sizes = stage["bytes"]
        assert sizes["activations"] == sum(stage["activations"].values()) > 0
        assert all(size > 0 for size in stage["activations"].values())
        assert sizes["sum"] == sum(size for kind, size in sizes.items() if kind != "sum")
        assert where != "stated" or sizes["sum"] + RESERVE <= int(memory) * GIB
    step = plan["step"]
    assert 0 < step["mfu"] < 1 and step["seconds"]["total"] == pytest.approx(
        sum(seconds for kind, seconds in step["seconds"].items() if kind != "total")
    )
    # what is issued holds what is useful, recomputation on top
    assert step["issued_flops_per_rank"] > 0.9 * plan["flops"]["per_step_and_rank"]["actual"] * _share_trained(recipe)


def _share_trained(recipe) -> float:
    """The convention counts backward as if everything were trained; with most of it frozen a third may be all there is."""
    return 1.0 if recipe.training.scope.startswith("all") else 1 / 3
