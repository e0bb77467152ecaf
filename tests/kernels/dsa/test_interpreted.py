"""Runs the folder `triton` in Triton's interpreter, in a process of its own: no GPU is needed for any kernel's values."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "triton"
LEAST = 250  # tests that must have run: an empty or skipped folder is not a pass


@pytest.mark.slow  # the interpreter takes about 50 microseconds for each operation of each program
def test_kernels_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[3], timeout=900)
    report = "\n".join(done.stdout.splitlines()[-80:] + done.stderr.splitlines()[-20:])
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, report
    assert int(passed[1]) >= LEAST, report
