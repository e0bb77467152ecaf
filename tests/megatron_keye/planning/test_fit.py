"""The search for layouts: what it returns fits, divides and is ranked; what cannot be is one clear refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_keye import train
from megatron_keye.config.layout import layout_errors
from megatron_keye.config.load import load_recipe
from megatron_keye.errors import UserError
from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.dry_run import make_plan
from megatron_keye.planning.fit import RESERVE, fit
from megatron_keye.planning.hardware import GIB, H200
from megatron_keye.planning.options import fit_words

STAGE1 = Path(__file__).resolve().parents[3] / "recipes" / "stage1.yaml"
SMALL = ["profile=mini", "data.seq_length=1024", "training.global_batch_size=8", "model.num_experts=4",
         "data.video.total_tokens=64"]  # fmt: skip


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()
    yield


@pytest.mark.slow  # traces every layout of two ranks, and plans the two best again
def test_layouts_that_fit_are_those_the_plan_says_fit():
    recipe = load_recipe(STAGE1, SMALL)
    memory = RESERVE + 8 * GIB
    found = fit(recipe, 2, memory, H200)
    speeds = [c.tokens_per_second_and_gpu for c in found.fitting]
    assert found.fitting and speeds == sorted(speeds, reverse=True)
    for candidate in found.fitting[:2]:
        recipe.parallel, recipe.training.recompute = candidate.parallel, candidate.recompute
        assert not layout_errors(recipe, 2)
        plan = make_plan(recipe, 2, H200)
        assert max(stage["bytes"]["sum"] for stage in plan["stages"]) == pytest.approx(candidate.peak, rel=1e-6)
        assert candidate.peak + RESERVE <= memory
        assert plan["step"]["tokens_per_second_and_gpu"] == pytest.approx(candidate.tokens_per_second_and_gpu)


def test_nothing_fits_names_the_nearest():
    recipe = load_recipe(STAGE1, SMALL)
    with pytest.raises(
        UserError, match=r"no layout of recipe stage1-mini on 1 GPUs fits in 5.5 GiB .*nearest is tensor"
    ):
        fit(recipe, 1, RESERVE + GIB // 2, H200)
    with pytest.raises(UserError, match="its weights alone are too large"):
        fit(load_recipe(STAGE1), 2, 16 * GIB, H200)
    with pytest.raises(UserError, match="memory=1GiB leaves nothing: 5 GiB are kept free"):
        fit(recipe, 1, GIB, H200)


def test_command_line(tmp_path, capsys):
    written = tmp_path / "fit.json"
    words = [str(STAGE1), *SMALL, "--json", str(written), "--fit", "gpus=1", "memory=80GiB"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "tokens/s/GPU" in out and "1 GPUs with 80 GiB" in out
    assert json.loads(written.read_text())["fitting"][0]["parallel"]["tensor"] == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["gpus=8"], "both are needed"),
        (["gpus=8", "memory=80"], "memory is given in GiB"),
        (["gpus=8", "memory=80GiB", "optimizer.lr=1"], "'optimizer.lr=1' is neither"),
        (["gpus=many", "memory=80GiB"], "write numbers"),
        (["gpus=0", "memory=80GiB"], "gpus is 1 or more"),
    ],
)
def test_fit_words_say_what_is_wrong(words, said):
    with pytest.raises(UserError, match=said):
        fit_words(words)
