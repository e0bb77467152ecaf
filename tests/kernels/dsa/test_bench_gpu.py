"""The GPU benchmark keeps working where there is no GPU: its whole path, tiny and interpreted, and its refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "kernels/benchmarks/bench_gpu.py"


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_refuses_without_cuda():
    done = start()
    assert done.returncode == 2
    assert done.stdout.strip() == "no CUDA device here: nothing to time"


@pytest.mark.slow  # interpreted kernels, some dozens of calls
def test_rehearsal(tmp_path):
    path = tmp_path / "bench.json"
    done = start("--rehearse", "--lengths", "64", "--overlaps", "4", "1", "--json", str(path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    document = json.loads(path.read_text())
    assert document["rehearsal"]
    assert document["complete"]
    rows = {row["row"]: row for row in document["rows"]}
    gates = [row for name, row in rows.items() if name.startswith("gate")]
    assert len(gates) == 8
    assert all(row["met"] for row in gates)
    whole = [row for row in document["rows"] if row["row"] == "dsa forward + backward"]
    assert 3 < whole[0]["u"] < 5 and 1 <= whole[1]["u"] < 2  # tiny: 7 harmonics cannot draw the arcs sharply
    assert all(row["error"] < 1e-2 and row["ratio"] > 0 and "note" not in row for row in whole)
    expected = {
        "dense forward + backward",
        "dsa forward",
        "dsa forward + backward, deterministic",
        "stage top-k thresholds",
    }
    expected |= {"warm-up forward + backward", "scores", "top-k", "attention forward", "attention backward", "loss"}
    assert set(rows) >= expected


def test_needs_torch_and_triton_alone():
    code = "import sys; sys.modules['numpy'] = None; sys.path.insert(0, sys.argv[1]); import bench_gpu"
    command = [sys.executable, "-W", "ignore", "-c", code, str(SCRIPT.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
