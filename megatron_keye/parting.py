"""Where two runs part: their metrics.jsonl step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError
from megatron_keye.metrics import read_rows

LOSSES = ("lm loss", "indexer loss", "load_balancing_loss")
# Differ when other data was read, whatever the model does.
DATA = ("tokens", "predicted-tokens", "sample-keys")


@dataclass(frozen=True)
class Tolerance:
    """Greatest relative difference: processors sum in other orders, and what they round differently grows with the steps."""

    early: float = 1e-4
    steps: int = 5  # so many from the first on are early
    late: float = 1e-2

    def at(self, step: int) -> float:
        return self.early if step <= self.steps else self.late


@dataclass(frozen=True)
class Parting:
    """`a` and `b`: the values of `key` at `step`; `allowed`: relative difference, 0 for what must be equal."""

    step: int
    key: str
    a: Any
    b: Any
    allowed: float

    def __str__(self) -> str:
        if self.allowed == 0:
            return (
                f"step {self.step}: {self.key} differ, {_short(self.a)} and {_short(self.b)}: the runs read other data"
            )
        by = relative(self.a, self.b)
        return f"step {self.step}: {self.key} {self.a} and {self.b}, {by:.2e} apart where {self.allowed:.0e} is allowed"


@dataclass(frozen=True)
class Comparison:
    """`loss` and `data`: the first step where each parts, None where none does; `greatest`: by key, (difference, step)."""

    steps: int
    loss: Parting | None
    data: Parting | None
    greatest: dict[str, tuple[float, int]]


def read_run(path: str | Path) -> dict[int, dict[str, Any]]:
    """Step: its metrics, of a run_dir or a file. Raises UserError."""
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is not there; give a run_dir with a metrics.jsonl, or such a file")
    rows = {int(row["iteration"]): row for row in read_rows(file) if "iteration" in row}
    if not rows:
        raise UserError(f"{file} holds no step")
    return rows


def compare(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]], tolerance: Tolerance) -> Comparison:
    """Over the steps and keys that both have. Raises UserError where they have none in common."""
    steps = sorted(a.keys() & b.keys())
    keys = [key for key in LOSSES if any(key in a[step] and key in b[step] for step in steps)]
    if not keys:
        raise UserError("the two runs have no step with a loss in common")
    loss = data = None
    greatest: dict[str, tuple[float, int]] = dict.fromkeys(keys, (0.0, steps[0]))
    for step in steps:
        for key in (k for k in DATA if k in a[step] and k in b[step]):
            if data is None and a[step][key] != b[step][key]:
                data = Parting(step, key, a[step][key], b[step][key], 0)
        for key in (k for k in keys if k in a[step] and k in b[step]):
            by = relative(a[step][key], b[step][key])
            greatest[key] = max(greatest[key], (by, step), key=lambda found: found[0])
            if loss is None and by > tolerance.at(step):
                loss = Parting(step, key, a[step][key], b[step][key], tolerance.at(step))
    return Comparison(len(steps), loss, data, greatest)


def relative(a: float | None, b: float | None) -> float:
    """|a - b| over the greater; infinite where one of them is None (it was not finite) and the other is not."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
