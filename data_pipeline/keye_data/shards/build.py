"""A whole build: records into tasks, tasks into shards, shards into a folder with its index and reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from keye_data.errors import DataError
from keye_data.shards.executors import Pool, run
from keye_data.shards.growing import claimed, growing_folder
from keye_data.shards.index import join, write_index
from keye_data.shards.options import Options
from keye_data.shards.reports import BAD, DUPLICATES, SAMPLES, report_duplicates
from keye_data.shards.shard import PARTS, Task
from keye_data.shards.sources import detect, read_source

Progress = Callable[[int], None]  # records done since the last call


@dataclass(frozen=True)
class Summary:
    samples: int
    shards: int
    bad: int  # samples left out, listed in bad.jsonl
    damaged: int  # samples kept although media of theirs cannot be read
    kept: int  # shards that an earlier, interrupted run had finished
    shared_media: int  # files that several samples use
    identical: int  # samples that say and show what an earlier one does


def build_shards(
    source: Path, out: Path, samples_per_shard: int = 1000, on_sample: Callable[[], None] | None = None
) -> tuple[int, int]:
    """Builds in this process; a sample whose media are damaged is kept, for the loader to skip: (samples, shards).

    `build` has every choice. Raises DataError naming the file and line at fault.
    """

    def progress(records: int) -> None:
        for _ in range(records):
            if on_sample:
                on_sample()

    done = build(source, out, Options(samples_per_shard=samples_per_shard, on_error="keep"), progress=progress)
    return done.samples, done.shards


def build(
    source: Path,
    out: Path,
    options: Options,
    *,
    pool: Callable[[], Pool] | None = None,
    progress: Progress = lambda records: None,
) -> Summary:
    """Writes the shards of `source` to the new folder `out`, which appears whole or not at all.

    `pool` makes the place to build them in; None is this process. A build that was interrupted goes on where it stopped:
    finished shards wait in a hidden folder beside `out`, and count if they are still what they were. However it ran, the
    same source and options give the same bytes. Raises DataError naming the file and line at fault.
    """
    options.check()
    source, out = source.absolute(), out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: it exists already; remove it or choose another folder")
    options = replace(
        options, format=options.format or detect(source), media=options.media and options.media.absolute()
    )
    if options.format == "webdataset" and out.is_relative_to(source):
        raise DataError(f"{out}: it lies among the tars that are read; choose a folder elsewhere")
    if options.media and options.format in ("captions", "webdataset"):
        raise DataError(f"--media {options.media}: {options.format} have their media beside them; leave it out")
    folder = growing_folder(out)
    with claimed(folder, source, options):
        counted = _Counter(progress)
        place = pool() if pool else None
        done = sorted(run(_tasks(source, folder, options), place, counted), key=lambda item: item.number)
        samples, bad = sum(item.samples for item in done), sum(item.bad for item in done)
        if samples == 0:
            raise DataError(f"{source}: it holds no sample" + (f"; all {bad} records are bad" if bad else ""))
        tars = {name: digest for item in done for name, digest in item.tars.items()}
        for path in folder.glob("*.tar"):
            if path.name not in tars:  # of an earlier run over other records
                path.unlink()
        join([folder / PARTS / f"{item.number:06d}.samples" for item in done], folder / SAMPLES)
        if bad:
            join([folder / PARTS / f"{item.number:06d}.bad" for item in done], folder / BAD)
        shared, identical = report_duplicates(folder / SAMPLES, folder / DUPLICATES)
        write_index(folder, tars)
        shutil.rmtree(folder / PARTS)
        if out.exists():
            out.rmdir()
        folder.replace(out)
    damaged, kept = sum(item.damaged for item in done), sum(item.kept for item in done)
    return Summary(samples, len(tars), bad, damaged, kept, shared, identical)


def _tasks(source: Path, folder: Path, options: Options) -> Iterator[Task]:
    """Which records go to which shard depends on their order alone."""
    records = read_source(source, str(options.format))
    number = 0
    while raws := list(islice(records, options.samples_per_shard)):
        yield Task(number, number * options.samples_per_shard, raws, source, folder, options)
        number += 1


class _Counter:
    """Reports progress from the files that grow by one byte a record."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seen: dict[int, int] = {}

    def __call__(self, tasks: list[Task]) -> None:
        for task in tasks:
            try:
                size = task.part("count").stat().st_size
            except OSError:
                continue
            before = self.seen.get(task.number, 0)
            if size > before:
                self.seen[task.number] = size
                self.progress(size - before)
