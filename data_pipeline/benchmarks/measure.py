"""What a piece of work costs, in a process of its own, and the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
HERE = Path(__file__).resolve().parent


@dataclass
class Cost:
    cpu: float  # seconds of all threads
    wall: float  # seconds


def cost(work: Callable[[], Result]) -> tuple[Cost, Result]:
    """What `work()` costs this process, and what it returns."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall), result


def least(costs: list[Cost]) -> dict[str, float]:
    """The run with the fewest CPU seconds: what the others had more of was the machine's."""
    return asdict(min(costs, key=lambda one: one.cpu))


def peak_mib() -> float:
    """Greatest resident size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(script: str, task: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs `script` of this folder with a task as JSON; returns the JSON of its last line.

    A process of its own has its own peak memory, threads and libraries. RuntimeError with the end of what it said if it fails.
    """
    command = [sys.executable, str(HERE / script), json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{script}: {said[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where and when: enough to know what the figures speak of."""
    packages = ("torch", "av", "nvidia-dali-cuda130", "torchcodec", "megatron-energon", "PyNvVideoCodec")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := installed(name))},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
