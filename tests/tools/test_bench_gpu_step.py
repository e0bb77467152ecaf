"""The one-GPU benchmark of a training step: rehearsed at mini size on a CPU, with nothing but what it says it needs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_gpu_step.py"
# What the data side and the recipes need, and a machine for this benchmark need not have.
ABSENT = ("omegaconf", "yaml", "av", "PIL", "transformers", "tokenizers", "safetensors", "webdataset", "wandb",
          "megatron.energon", "nvidia.dali", "matplotlib", "psutil", "einops")  # fmt: skip


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "sitecustomize.py").write_text(f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n")
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path: Path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "no CUDA device: nothing to measure; --mini runs the same path at mini size on a CPU"
    ]
    assert done.stdout == ""


@pytest.mark.slow  # four processes, each with its own imports
def test_rehearsal_at_mini_size(tmp_path: Path):
    file = tmp_path / "rows.json"
    done = run(tmp_path, "--mini", "--lengths", "64", "--steps", "2", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    dense, sparse = json.loads(file.read_text())
    for row in (dense, sparse):
        found, plan = row["measured"], row["planned"]
        assert found["experts"] == "GroupedExperts"
        assert all(math.isfinite(loss) for loss in found["losses"])
        assert found["losses"][-1] < found["losses"][0], "the same row again and again: it is being learnt"
        assert plan["peak"] > 0
        assert plan["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(64 / found["seconds"])
    assert sparse["measured"]["flops"] != dense["measured"]["flops"]
    assert done.stdout.count("\n") == 5, "a line on the machine, two of heading, two of results"
