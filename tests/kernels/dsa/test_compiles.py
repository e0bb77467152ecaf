"""Every kernel, as the operators start it at Keye's geometry, compiles for GPUs that are not here, and fits them.

Compiling is in a process of its own, since this one may be interpreting. Triton caches what it compiled; a cold cache takes
two to three minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes that one program may use
TENSOR_MEMORY = 512  # columns of an SM of sm_100
pytestmark = pytest.mark.slow  # two to three minutes with a cold cache: the compilers of three GPUs for every kernel


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("compiled") / "figures.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "kernels/benchmarks/compiled.py"), "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    print(done.stdout)  # the table, for who asks with -s or when an assertion fails
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())["kernels"]


def on(compiled: list[dict], target: str) -> list[dict]:
    entries = [entry for entry in compiled if entry["target"] == target]
    assert len(entries) >= 10, f"{len(entries)} kernels on {target}: the operators start more than that"
    return entries


def test_all_compile(compiled):
    assert not [entry for entry in compiled if "error" in entry and entry["target"] != "gfx942"]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_shared_memory_fits(target, compiled):
    over = [entry for entry in on(compiled, target) if entry["shared"] > SHARED_MEMORY[target]]
    assert not over


def test_tensor_memory_fits(compiled):
    assert not [entry for entry in on(compiled, "sm_100") if entry["tensor_memory"] > TENSOR_MEMORY]


def test_no_spills_on_hopper(compiled):
    assert not [entry for entry in on(compiled, "sm_90") if entry["spills"]]


def test_matrix_kernels_use_the_matrix_units(compiled):
    """Whatever holds a tl.dot: scores, attention, its backward, the teacher, the indexer's backward."""
    for target, unit in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        multiplying = [entry for entry in on(compiled, target) if entry["dots"]]
        assert len({entry["kernel"] for entry in multiplying}) >= 8
        assert not [entry for entry in multiplying if not entry[unit]]
