"""Runs of the real entry point for tests: stage 1's mini profile on generated clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


def command(
    run_dir: Path, shards: Path, tiktoken: Path, *overrides: str, ranks: int = 1, recipe: str = "stage1"
) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [
        sys.executable,
        *torchrun,
        *("-m", "megatron_keye.train", str(REPOSITORY / "recipes" / f"{recipe}.yaml"), "profile=mini"),
        f"run_dir={run_dir}",
        f"data.tokenizer={tiktoken}",
        f"data.sources=[{{path: {shards}, weight: 1.0}}]",
        *("training.init_from=null", "data.seq_length=256", "data.long_short_ratio=null"),
        *("logging.wandb=off", "optimizer.warmup_steps=0"),
        *("optimizer.schedule=constant", "optimizer.decay_steps=null"),
        *overrides,
    ]


def start(words: list[str], **kwargs) -> subprocess.Popen:
    path = os.pathsep.join(str(REPOSITORY / p) for p in (".", "kernels", "data_pipeline"))
    return subprocess.Popen(
        words,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=run_folder(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def run_folder(words: list[str]) -> Path:
    """Somewhere that is not the repository: nothing may depend on where a user stands."""
    return next((Path(w.removeprefix("run_dir=")).parent for w in words if w.startswith("run_dir=")), Path("/"))


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """(exit code, everything it printed). Where it takes longer than `timeout` seconds, nothing of it is left behind."""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        raise
    return process.returncode, text


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
