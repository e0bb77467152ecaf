"""The hidden folder in which a build grows, so that it can go on after an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from keye_data.errors import DataError
from keye_data.shards.options import Options
from keye_data.shards.shard import PARTS
from keye_data.shards.tokens import parse_budget
from keye_data.video.stored import VERSION


def growing_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.building"


def finished_shards(out: Path) -> int:
    """How many shards of `out` an interrupted build has left finished."""
    return len(list((growing_folder(out) / PARTS).glob("*.json")))


@contextlib.contextmanager
def claimed(folder: Path, source: Path, options: Options) -> Iterator[None]:
    """`folder` for one build alone. What it holds stays after an error, if a shard in it is finished.

    DataError while another build writes there, and where an earlier one chose otherwise.
    """
    parts = folder / PARTS
    settings = _settings(source, options)
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another build is writing there; wait for it or choose another --out") from None
        _compare(parts / "settings", settings, folder)
        for path in parts.glob("*.growing"):  # of a run that was killed
            path.unlink(missing_ok=True)
        try:
            yield
        finally:
            if parts.is_dir() and not any(parts.glob("*.json")):
                shutil.rmtree(folder)


def _settings(source: Path, options: Options) -> dict[str, str]:
    """Every choice that decides the bytes of a finished shard. Not --on-error: shard by shard that matters only to bad samples."""
    chosen = {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options)}
    del chosen["on_error"]
    budgets = {f"budget {name}": repr(settings) for name, settings in map(parse_budget, options.budgets)}
    return {"source": str(source), "version of packet tables": str(VERSION), **chosen, **budgets}


def _compare(path: Path, settings: dict[str, str], folder: Path) -> None:
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError):
        earlier = settings
    for name in sorted({*earlier, *settings}):
        if earlier.get(name) != settings.get(name):
            raise DataError(
                f"{folder}: a build was begun there with {name} {earlier.get(name)}, now {settings.get(name)}; "
                "finish it as it was begun, or remove that folder"
            )
    path.write_text(json.dumps(settings), encoding="utf-8")
