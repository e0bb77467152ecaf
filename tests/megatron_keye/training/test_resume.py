"""A run that is killed, stopped or moved goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from training_runs import command, finish, metrics, start

EXACT = (
    *("iteration", "lm loss", "grad-norm", "sample-keys", "consumed samples", "learning-rate"),
    *("consumed-samples-by-source", "epochs-by-source", "skipped-samples-by-reason"),
)


def same(a: list[dict], b: list[dict]) -> bool:
    return [[row[k] for k in EXACT] for row in a] == [[row[k] for k in EXACT] for row in b]


@pytest.mark.slow  # three runs of two ranks through torchrun
def test_sigkill_and_restart_equals_the_uninterrupted_run(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    options = ("training.steps=7", "checkpoint.interval=2", "parallel.expert=2")
    whole = command(tmp_path / "whole", clip_shards, qwen_tiktoken, *options, ranks=2)
    code, text = finish(start(whole))
    assert code == 0, text

    words = command(tmp_path / "killed", clip_shards, qwen_tiktoken, *options, ranks=2)
    process = start(words)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 5):
        time.sleep(0.05)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    _, text = finish(process)
    assert process.returncode != 0, text
    newest = max(f.name for f in (tmp_path / "killed" / "checkpoints").glob("iter_*"))
    assert newest < "iter_0000007", "killed too late to show anything"

    code, text = finish(start(words))
    assert code == 0, text
    assert f"going on from {tmp_path / 'killed' / 'checkpoints' / newest}" in text
    assert same(metrics(tmp_path / "whole"), metrics(tmp_path / "killed"))


@pytest.mark.slow  # two runs
def test_sigterm_saves_and_leaves_with_exit_code_zero(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, "training.steps=200", "checkpoint.interval=null")
    process = start(words, start_new_session=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's worker gets it too, as under a batch system
    code, text = finish(process)
    assert code == 0, text
    reached = metrics(tmp_path / "run")[-1]["iteration"]
    state = json.loads((tmp_path / "run" / "checkpoints" / f"iter_{reached:07d}" / "state.json").read_text())
    assert state["iteration"] == reached
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(reached)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "run" / "resolved.yaml").is_file()
