"""What the phases of a curriculum came to: one row each, from their metrics.jsonl. A column that no phase fills is left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_keye.config.curriculum import Phase
from megatron_keye.metrics import read_rows


@dataclass(frozen=True)
class Row:
    """`first` and `last` loss: means over the first and the last tenth of the steps. None: not measured."""

    phase: str
    steps: int
    tokens: int  # real ones, padding left out
    first: float | None
    last: float | None
    indexer: float | None  # KL a token, mean over layers, of the last tenth
    recall: float | None  # the newest one: share of dense attention's mass on the chosen keys, mean over layers
    seconds: float  # of the steps that counted


def row_of(phase: Phase) -> Row | None:
    """None for a phase that has not begun."""
    file = Path(phase.recipe.run_dir) / "metrics.jsonl"
    rows = read_rows(file) if file.is_file() else []
    if not rows:
        return None
    tenth = max(len(rows) // 10, 1)
    recalls = [r["dsa/recall-mass"] for r in rows if r.get("dsa/recall-mass") is not None]
    return Row(
        phase=phase.name,
        steps=int(rows[-1]["iteration"]),
        tokens=sum(r["tokens"] for r in rows),
        first=_mean(rows[:tenth], "lm loss"),
        last=_mean(rows[-tenth:], "lm loss"),
        indexer=_mean(rows[-tenth:], "indexer loss"),
        recall=recalls[-1] if recalls else None,
        seconds=sum(r["iteration-time"] for r in rows),
    )


def print_table(rows: list[Row]) -> None:
    columns = {
        "steps": [f"{r.steps:,}" for r in rows],
        "tokens": [f"{r.tokens:,}" for r in rows],
        "lm loss, first": [_number(r.first) for r in rows],
        "last": [_number(r.last) for r in rows],
        "indexer KL": [_number(r.indexer) for r in rows],
        "recall": [_number(r.recall) for r in rows],
        "time": [f"{r.seconds:,.0f} s" for r in rows],
    }
    table = Table(title="Phases", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("phase")
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    for name in kept:
        table.add_column(name, justify="right")
    for row, cells in zip(rows, zip(*kept.values())):
        table.add_row(row.phase, *cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=110)
    console.print()
    console.print(table)


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
