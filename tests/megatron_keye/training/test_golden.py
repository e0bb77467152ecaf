"""Twenty steps of every recipe's mini profile against recorded losses, kept as small text files in tests/megatron_keye/golden.

What changes them on purpose records them anew: `RECORD_GOLDEN=1 pytest tests/megatron_keye/training/test_golden.py`, and the
difference of the files shows what changed. `tools/loss_compare.py` takes such a file for a run.
"""

from __future__ import annotations

import json
import os

import pytest
from training_runs import REPOSITORY, command, finish, metrics, start

from megatron_keye.parting import Tolerance, compare, read_run

GOLDEN = REPOSITORY / "tests" / "megatron_keye" / "golden"
RECIPES = sorted(file.stem for file in (REPOSITORY / "recipes").glob("*.yaml") if file.stem != "curriculum")
STEPS = 20
KEPT = ("iteration", "tokens", "predicted-tokens", "lm loss", "indexer loss", "load_balancing_loss")


def test_every_recipe_has_its_losses():
    if not os.environ.get("RECORD_GOLDEN"):
        assert sorted(file.stem for file in GOLDEN.glob("*.jsonl")) == RECIPES
        assert all(len(read_run(file)) == STEPS for file in GOLDEN.glob("*.jsonl"))


@pytest.mark.slow  # a run of each recipe
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_those_recorded(recipe, clip_shards, qwen_tiktoken, tmp_path):
    # rows of 256 tokens with a top-k that they exceed, one thread, fp32
    overrides = (f"training.steps={STEPS}", "checkpoint.interval=null", "logging.plot=false", "model.topk=32")
    code, text = finish(start(command(tmp_path / "run", clip_shards, qwen_tiktoken, *overrides, recipe=recipe)))
    assert code == 0, text
    rows = metrics(tmp_path / "run")
    file = GOLDEN / f"{recipe}.jsonl"
    if os.environ.get("RECORD_GOLDEN"):
        file.write_text("".join(json.dumps({key: row[key] for key in KEPT if key in row}) + "\n" for row in rows))
        pytest.skip(f"recorded {file}")
    golden, run = read_run(file), read_run(tmp_path / "run")
    assert all(golden[step].keys() <= run[step].keys() for step in golden), "a key has left the log"
    found = compare(golden, run, Tolerance())
    assert found.steps == STEPS
    assert found.data is None, found.data
    assert found.loss is None, found.loss
