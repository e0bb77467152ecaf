"""What a simulation found, on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_summary(name: str, found: dict[str, Any], bad: list[Any], console: Console | None = None) -> None:
    """`found` as measure.summary makes it. A pipe or a file gets lines of 110 columns."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=110)
    table = Table(title=f"Loader of {name}, one data-parallel rank", title_justify="left", box=box.SIMPLE_HEAD)
    table.show_header = False
    for label, value in _lines(found):
        table.add_row(label, value)
    console.print(table)
    sources = Table(title="Sources", title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(("source", "samples", "share", "skipped", "epochs", "samples in it")):
        sources.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for path, one in found["sources"].items():
        share, epochs = f"{one['share']:.1%}", f"{one['epochs']:.2f}"
        sources.add_row(path, f"{one['samples']:,}", share, f"{one['skipped']:,}", epochs, f"{one['in_source']:,}")
    console.print(sources)
    for reason, count in sorted(found["skipped"].items(), key=lambda item: -item[1]):
        first = next(one for one in bad if one.reason == reason)
        console.print(f"{count} x {reason}, first: {first.message}", markup=False)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    tokens, memory, wait = found["sample_tokens"], found["memory_mib"], found["wait_ms"]
    fill = "-" if found["fill"] is None else f"{found['fill']:.1%}"
    worker = f"largest worker {memory['worker_peak']:,.0f} MiB ({memory['worker_growth']:+,.0f} over the second half)"
    return [
        ("read", f"{found['samples']:,} samples in {found['rows']:,} rows of {found['row_tokens']:,} tokens"),
        ("", f"{found['tokens']:,} tokens, {found['frames']:,} frames, {found['pictures']:,} pictures"),
        ("pace", f"{_rate(found['samples_per_second'])} samples/s, {_rate(found['tokens_per_second'])} tokens/s, "
                 f"{_rate(found['frames_per_second'])} frames/s, behind the first batch"),
        ("first batch", f"after {found['seconds_to_first_batch']:.1f} s"),
        ("packing fill", fill),
        ("tokens of a sample", f"5 % {tokens['p5']:,.0f}, median {tokens['p50']:,.0f}, 95 % {tokens['p95']:,.0f}, "
                               f"most {tokens['max']:,}"),
        ("wait for a batch", f"mean {wait['mean']:.1f} ms, 95 % {wait['p95']:.1f} ms; decoding takes "
                             f"{found['decode_ms_per_batch']:.1f} ms"),
        ("memory, peak", f"main process {memory['main_peak']:,.0f} MiB, "
         + (worker if memory["worker_peak"] else "no workers")),
        ("skipped", f"{sum(found['skipped'].values()):,} samples"),
    ]  # fmt: skip


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
