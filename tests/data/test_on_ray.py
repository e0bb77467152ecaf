"""Runs every test that starts Ray in a process of its own: Ray's threads do not go well with the forks of other tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LEAST = 3  # tests that must have run: skipped ones are not a pass


@pytest.mark.slow  # starts Ray three times
def test_what_needs_ray():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "ray", "tests"]
    environment = os.environ | {"OWN_PROCESS": "ray"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    report = "\n".join(done.stdout.splitlines()[-80:] + done.stderr.splitlines()[-20:])
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, report
    assert int(passed[1]) >= LEAST, report
