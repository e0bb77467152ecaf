"""Existing WebDataset tars as a source: which members make up each sample. Nothing is ever unpacked to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from keye_data.shards.records import Raw

Member = tuple[str, int, int]  # name, offset of its bytes, size


def tar_records(path: Path) -> Iterator[Raw]:
    """One record for each run of members with the same key, which is the name up to its first dot.

    What cannot be used becomes an "unreadable" record that says why: links, names that lead out of the archive, a damaged rest.
    """
    for key, run in groupby(_members(path), key=lambda item: _key(item[0][0])):
        members, problems = [], []
        for member, problem in run:
            members.append(member)
            problems.append(problem)
        place = f"sample {key}"
        fault = next(filter(None, problems), None) or _twice(members)
        if fault:
            yield Raw("unreadable", path, place, f"{path}, {place}: {fault}")
        else:
            yield Raw("webdataset", path, place, members)


def _key(name: str) -> str:
    parent, _, base = name.rpartition("/")
    key = base.partition(".")[0]
    return f"{parent}/{key}" if parent else key


def _members(path: Path) -> Iterator[tuple[Member, str | None]]:
    """(member, what is wrong with it)."""
    total = path.stat().st_size
    name = "(beginning)"
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all headers otherwise
                name = info.name
                if info.isdir() or PurePosixPath(name).name.startswith("__"):
                    continue
                problem = None
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    problem = f"the member name {name!r} leads out of the archive"
                elif not info.isreg() or info.issparse():
                    problem = f"the member {name!r} is a link, a device or sparse"
                elif info.offset_data + info.size > total:
                    problem = f"the tar is cut short in {name!r}"
                yield (name, info.offset_data, info.size), problem
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        yield (f"behind {name}", 0, 0), f"the tar is damaged or compressed behind {name}: {error}; what follows is lost"


def _twice(members: list[Member]) -> str | None:
    names = [name for name, *_ in members]
    return next((f"it has the member {name!r} twice" for name in names if names.count(name) > 1), None)
