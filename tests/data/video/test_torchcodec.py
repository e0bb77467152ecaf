"""The torchcodec backend for real, where it is not installed: fetched, and lent PyAV's FFmpeg, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FFMPEG = HERE.parents[2] / "data_pipeline" / "benchmarks" / "ffmpeg.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron_keye" / "torchcodec"


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="the other tests run with it already")
def test_the_other_tests_hold_with_torchcodec():
    spec = importlib.util.spec_from_file_location("ffmpeg", FFMPEG)
    assert spec and spec.loader
    ffmpeg = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ffmpeg)
    environment = ffmpeg.torchcodec(CACHE)
    if isinstance(environment, str):
        pytest.skip(f"torchcodec needs a package registry that has it: {environment}")
    tests = [str(HERE / name) for name in ("test_exact_frames.py", "test_pixels.py", "test_odd_files.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "torchcodec", *tests]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 60, done.stdout
