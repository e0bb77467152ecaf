"""What a run has written beyond its checkpoint is written again when it goes on, so it is forgotten first."""

from __future__ import annotations

import json
from pathlib import Path

from keye_data.accounting import Skipped
from megatron_keye.config.load import load_recipe
from megatron_keye.training.logging import RunLog

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "stage1.yaml"


def test_skipped_samples_of_steps_to_be_taken_again_are_forgotten(tmp_path):
    recipe = load_recipe(RECIPE, ["profile=mini", "logging.wandb=off", f"run_dir={tmp_path}"])

    def one(key: str) -> Skipped:
        return Skipped(key, "films", "corrupt clip", f"{key}: damaged")

    log = RunLog(recipe, tmp_path, True, 0)
    for iteration in (1, 2, 3):
        log.skipped(iteration, [one(f"{iteration}a"), one(f"{iteration}b")] if iteration != 2 else [])
    RunLog(recipe, tmp_path, True, 2).skipped(3, [one("3a")])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["key"]) for line in lines] == [(1, "1a"), (1, "1b"), (3, "3a")]
    assert lines[0] == {
        "iteration": 1,
        "key": "1a",
        "source": "films",
        "reason": "corrupt clip",
        "message": "1a: damaged",
        "masked": False,
    }
    RunLog(recipe, tmp_path, False, 0).skipped(4, [one("4a")])  # another rank writes nothing
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
