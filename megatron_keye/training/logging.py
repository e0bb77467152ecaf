"""What a run says: one line a step in Megatron's wording, metrics.jsonl, skipped.jsonl, wandb, and a picture of the loss.

The last rank of the first data block logs (it holds the loss); all others are silent.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keye_data.accounting import Skipped
from megatron_keye.config.recipe import Recipe
from megatron_keye.metrics import read_rows


def say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)


class RunLog:
    """`metrics.jsonl` is what other programs read: one JSON object a step, with wandb's keys."""

    def __init__(self, recipe: Recipe, run_dir: Path, active: bool, first_iteration: int):
        self.recipe, self.active = recipe, active
        self.path = run_dir / "metrics.jsonl"
        self.skipped_path = run_dir / "skipped.jsonl"
        self.picture = run_dir / "loss.png"
        self.wandb: Any = None
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.skipped_path):
            _forget_after(path, first_iteration)
        if recipe.logging.wandb != "off":
            import wandb

            self.wandb = wandb.init(
                project=recipe.logging.wandb_project,
                name=recipe.name,
                dir=str(run_dir),
                mode="offline" if recipe.logging.wandb == "offline" else "online",
                config=asdict(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )

    def step(self, metrics: dict[str, Any]) -> None:
        if not self.active:
            return
        with self.path.open("a") as stream:
            stream.write(json.dumps({k: _finite(v) for k, v in metrics.items()}, allow_nan=False) + "\n")
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=metrics["iteration"])
        if metrics["iteration"] % self.recipe.logging.interval == 0:
            say(step_line(metrics, self.recipe.training.steps))

    def skipped(self, iteration: int, bad: list[Skipped]) -> None:
        """Into skipped.jsonl, one JSON object a sample: every sample that the step could not use, and why."""
        if self.active and bad:
            with self.skipped_path.open("a") as stream:
                stream.write("".join(json.dumps({"iteration": iteration, **asdict(one)}) + "\n" for one in bad))

    def finish(self) -> None:
        if not self.active:
            return
        if self.recipe.logging.plot:
            plot_losses(self.path, self.picture)
        if self.wandb is not None:
            self.wandb.finish()


def _forget_after(path: Path, iteration: int) -> None:
    """Steps after the checkpoint that a run goes on from will be taken, and written, again."""
    if path.exists():
        lines = [x for x in path.read_text().splitlines() if _iteration_of(x) <= iteration]
        draft = path.with_suffix(".draft")  # a kill in this moment must not lose the log
        draft.write_text("".join(f"{x}\n" for x in lines))
        os.replace(draft, path)


def step_line(m: dict[str, Any], steps: int) -> str:
    fields = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {m['iteration']:8d}/{steps:8d}",
        f"consumed samples: {m['consumed samples']:12d}",
        f"elapsed time per iteration (ms): {m['iteration-time'] * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {m['throughput']:.4f}",
        f"tokens per second: {m['tokens-per-second']:.0f}",
        f"learning rate: {m['learning-rate']:.6E}",
        f"global batch size: {m['batch-size']:5d}",
        f"lm loss: {m['lm loss']:.6E}",
    ]
    fields += [f"{k}: {m[k]:.6E}" for k in ("indexer loss", "load_balancing_loss", "dsa/recall-mass") if k in m]
    fields.append(f"grad norm: {m['grad-norm']:.3f}" if m["grad-norm"] is not None else "grad norm: none, step skipped")
    fields += [f"number of skipped iterations: {m['skipped-steps']:3d}", f"skipped samples: {m['skipped-samples']}"]
    return " | ".join(fields) + " |"


def plot_losses(metrics: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(metrics)
    if not rows:
        return
    names = [n for n in ("lm loss", "indexer loss") if any(n in r for r in rows)]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(7, 3 * len(names)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names):
        points = [(r["iteration"], r[name]) for r in rows if r.get(name) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points])
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iteration_of(line: str) -> int:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError):  # a line cut short by a kill
        return sys.maxsize
