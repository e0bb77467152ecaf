"""The unit of work: some records -> one shard (more, where it grows too large), its part of the index, and a note that it is done.

It depends on nothing but its records and the options, so that any process on any machine may do it, again if need be.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keye_data.errors import DataError
from keye_data.shards import tokens
from keye_data.shards.options import Options
from keye_data.shards.records import Raw, Record, fingerprint
from keye_data.shards.reencode import SUFFIX
from keye_data.shards.sample import fill
from keye_data.shards.understand import understand
from keye_data.shards.writing import Members, Tars, sha256, whole_file

PARTS = ".parts"  # folder of what is only needed until the build ends


@dataclass(frozen=True)
class Task:
    number: int  # of the shard
    first: int  # number of its first sample, from which keys are made
    raws: list[Raw]
    source: Path
    folder: Path  # where the build grows
    options: Options

    def part(self, suffix: str) -> Path:
        return self.folder / PARTS / f"{self.number:06d}.{suffix}"


@dataclass(frozen=True)
class Done:
    number: int
    tars: dict[str, str]  # name -> sha256
    samples: int
    bad: int  # samples left out
    damaged: int  # samples whose media cannot be read, kept as they are
    kept: bool = False  # an earlier run had finished it


def build_shard(task: Task) -> Done:
    """Writes a shard, or keeps it where an earlier run has finished it. DataError at a bad sample, unless those are skipped."""
    return _finished(task) or _build(task)


def _finished(task: Task) -> Done | None:
    """What an earlier run noted, if the records, their files and the bytes it wrote are still the same, and faults still faults."""
    try:
        note = json.loads(task.part("json").read_bytes())
        same = note["records"] == fingerprint(task.raws, task.source)
        # damaged samples may be treated in another way now
        same = same and (note["on_error"] == task.options.on_error or note["bad"] + note["damaged"] == 0)
        same = same and all(_state(Path(path)) == (path, size, time) for path, size, time in note["files"])
        same = same and not any(_meant(task, task.raws[i]) for i in note["meaningless"])
        written = {**note["tars"], **note["lists"]}
        same = same and all(sha256(task.folder / name) == digest for name, digest in written.items())
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return Done(task.number, note["tars"], note["samples"], note["bad"], note["damaged"], kept=True) if same else None


def _meant(task: Task, raw: Raw) -> bool:
    """Whether a record that an earlier run could not use can be used now: a file that it names may have come since."""
    try:
        _understood(task, raw, set())
    except DataError:
        return False
    return True


def _build(task: Task) -> Done:
    parts, options = task.folder / PARTS, task.options
    task.part("json").unlink(missing_ok=True)
    processors = tokens.processors(options.tokenizer, options.budgets) if options.tokenizer else {}
    files: set[tuple[str, int, int]] = set()
    samples = bad = damaged = 0
    meaningless: list[int] = []
    with contextlib.ExitStack() as stack:
        index, faults = (stack.enter_context(whole_file(task.part(name), parts)) for name in ("samples", "bad"))
        counter = stack.enter_context(task.part("count").open("wb", buffering=0))
        tars = stack.enter_context(Tars(task.folder, parts, f"shard-{task.number:06d}", options.shard_bytes))
        for i, raw in enumerate(task.raws):
            key, origin, record = f"{task.first + i:09d}", raw.origin(task.source), None
            with contextlib.closing(Members(parts)) as members:
                try:
                    record = _understood(task, raw, files)
                    line = fill(record, raw.where, options, members, processors)
                except DataError as error:
                    if options.on_error != "skip":
                        raise
                    faults.write(_line({"origin": origin, "reason": error.reason, "message": str(error)}))
                    bad += 1
                    meaningless += [i] if record is None else []
                else:
                    shard = tars.add(key, members)
                    index.write(_line({"key": key, "shard": shard, "origin": origin, **line}))
                    samples += 1
                    damaged += any("problem" in entry for entry in line["media"])
            counter.write(b".")  # one byte a record: the size of this file is the progress
    lists = {f"{PARTS}/{task.part(name).name}": sha256(task.part(name)) for name in ("samples", "bad")}
    done = Done(task.number, tars.written, samples, bad, damaged)
    note = {"records": fingerprint(task.raws, task.source), "files": sorted(files), "meaningless": meaningless}
    with whole_file(task.part("json"), parts) as file:
        file.write(_line({**note, **asdict(done), "lists": lists, "on_error": options.on_error}))
    return done


def _understood(task: Task, raw: Raw, files: set[tuple[str, int, int]]) -> Record:
    """The sample; the state of what it is made of goes to `files`."""
    record = understand(raw, task.options.media, SUFFIX if task.options.reencode else None)
    files |= {_state(file.path) for file in record.media.values()}
    if raw.format == "captions":
        files.add(_state(raw.file.with_suffix(".txt")))
    elif raw.format == "webdataset":
        files.add(_state(raw.file))
    return record


def _state(path: Path) -> tuple[str, int, int]:
    """(path, size, time of change in ns): a build that goes on later sees whether a file is still the same."""
    stat = os.stat(path)
    return str(path), stat.st_size, stat.st_mtime_ns


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
