"""How far a conversion is, in bytes.

with progress("writing", total) as advance:
    advance(how_many_more)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_keye.journal import Advance, ignore

Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def quiet(what: str, total: int) -> Iterator[Advance]:
    yield ignore


@contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """On stderr: done of total, rate, time left."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:>8}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(what, total=total)
        yield lambda count: display.advance(task, count)
