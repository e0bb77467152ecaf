"""From published clips, pictures and texts to a trained, exported and verified mini Keye, on two ranks of one laptop.

    python tools/demo.py [--profile full|short]        # `make demo`; full: see README for time and disk

Every step is a command that a user would type, and is printed before it runs. The second phase is killed in the middle
(SIGKILL) and started again by the same command, to show that it goes on where its last checkpoint stands.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_keye.cli import run_cli
from megatron_keye.errors import UserError

DEMO = Path("demo")
RANKS = 2


@dataclass(frozen=True)
class Profile:
    """Steps of each phase."""

    stage0: int
    stage1: int
    warmup: int
    sparse: int


PROFILES = {"full": Profile(24, 48, 12, 12), "short": Profile(4, 8, 4, 4)}


def main(argv: list[str]) -> None:
    name = argv[argv.index("--profile") + 1] if "--profile" in argv else "full"
    if name not in PROFILES:
        raise UserError(f"--profile {name}: choose one of {', '.join(PROFILES)}")
    steps, begin = PROFILES[name], time.perf_counter()
    prepare_data()
    runs = {phase: DEMO / "runs" / phase for phase in ("stage0", "stage1", "dsa_warmup", "dsa_sparse")}
    for stale in runs.values():
        subprocess.run(["rm", "-rf", str(stale)], check=True)
    run(train("stage0", runs["stage0"], steps.stage0, init_from=None))
    stage1 = train("stage1", runs["stage1"], steps.stage1, init_from=runs["stage0"])
    kill_in_the_middle(stage1, runs["stage1"], steps.stage1)
    run(stage1)
    run(train("dsa_warmup", runs["dsa_warmup"], steps.warmup, init_from=runs["stage1"]))
    run(train("dsa_sparse", runs["dsa_sparse"], steps.sparse, init_from=runs["dsa_warmup"]))
    exported = DEMO / "exported"
    subprocess.run(["rm", "-rf", str(exported)], check=True)
    checkpoints = str(runs["dsa_sparse"] / "checkpoints")
    convert = [sys.executable, "tools/convert.py"]
    run([*convert, "export", "--ckpt", checkpoints, "--out", str(exported)])
    run([*convert, "verify", "--hf", str(exported), "--ckpt", checkpoints])
    report(runs, exported, time.perf_counter() - begin)


def prepare_data() -> None:
    samples, shards = DEMO / "samples", DEMO / "shards"
    run([sys.executable, "tools/fetch_samples.py", "--out", str(samples)])
    for kind in ("pictures", "text", "videos"):
        if not (shards / kind).is_dir():
            source = samples / "source" / f"{kind}.jsonl"
            run([sys.executable, "tools/build_shards.py", str(source), "--out", str(shards / kind)])


def train(phase: str, run_dir: Path, steps: int, init_from: Path | None) -> list[str]:
    """The command of one phase. Two ranks: data parallel, the experts spread over them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    return [
        *torchrun,
        *("-m", "megatron_keye.train", f"recipes/{phase}.yaml", "profile=mini"),
        f"run_dir={run_dir}",
        f"training.steps={steps}",
        f"training.init_from={init_from / 'checkpoints' if init_from else 'null'}",
        f"checkpoint.interval={max(2, steps // 4)}",
        "parallel.expert=2",
        "optimizer.schedule=cosine",
        f"optimizer.warmup_steps={min(5, steps // 4)}",
        "optimizer.decay_steps=null",
    ]


def run(command: list[str]) -> None:
    print(f"\n$ {shlex.join(shown(command))}", flush=True)
    done = subprocess.run(command, env=environment(), check=False)
    if done.returncode:
        raise UserError(f"the command above ended with exit code {done.returncode}")


def kill_in_the_middle(command: list[str], run_dir: Path, steps: int) -> None:
    """Start the phase, and SIGKILL every rank once half of its steps are logged."""
    print(f"\n$ {shlex.join(shown(command))}    # will be killed half-way", flush=True)
    process = subprocess.Popen(command, env=environment())
    while process.poll() is None and last_iteration(run_dir) < steps // 2 + 1:
        time.sleep(0.2)
    if process.poll() is not None:
        raise UserError(
            f"the command above ended by itself with exit code {process.returncode}, before half of its steps"
        )
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    process.wait()
    print(f"\nkilled at iteration {last_iteration(run_dir)}; the same command again:", flush=True)


def last_iteration(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    try:
        return int(json.loads(lines[-1])["iteration"]) if lines else 0
    except ValueError:  # caught while being written
        return 0


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def shown(command: list[str]) -> list[str]:
    """As a user would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return ["torchrun", *words[3:]] if words[:3] == ["python", "-m", "torch.distributed.run"] else words


def report(runs: dict[str, Path], exported: Path, seconds: float) -> None:
    print(f"\nDone in {seconds:.0f} s.")
    for phase, folder in runs.items():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first, last = rows[0], rows[-1]
        losses = f"lm loss {first['lm loss']:.3f} -> {last['lm loss']:.3f}"
        if "indexer loss" in last:
            losses += f", indexer loss {first['indexer loss']:.4f} -> {last['indexer loss']:.4f}"
        print(f"  {phase:11s} {len(rows):4d} steps  {losses}")
        print(f"              run {folder}, picture of the loss {folder / 'loss.png'}")
    print(f"  exported model in Hugging Face format: {exported}")


if __name__ == "__main__":
    run_cli(main)
