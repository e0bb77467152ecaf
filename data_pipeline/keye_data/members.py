"""The members of a sample in a tar: where each lies, found by reading headers alone."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from keye_data.errors import DataError
from keye_data.stretch import UNREADABLE, Stretch

NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as WebDataset cuts names: up to the first dot of the last part
META = re.compile(r"__[^/]*__($|/)")


def find_members(path: str, offset: int, size: int) -> tuple[str, dict[str, Stretch]]:
    """(key, member's name behind the key -> its place) of the sample whose headers and data fill these bytes of a tar.

    Only plain files count: links, devices and the like are passed over, and nothing is ever written under a member's name.
    DataError for headers that are damaged or cut off, and for a name that leads out of the shard.
    """
    end = offset + size
    found: dict[str, Stretch] = {}
    key = ""
    try:
        with open(path, "rb") as file:
            there = file.seek(0, os.SEEK_END)
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in _headers(tar, end):
                    name = NAME.fullmatch(info.name)
                    if not info.isreg() or info.issparse() or name is None or META.match(info.name):
                        continue
                    if info.size < 0 or info.offset_data + info.size > end:
                        raise tarfile.ReadError(f"the header of {info.name!r} speaks of {info.size} bytes")
                    if info.offset_data + info.size > there:
                        raise tarfile.ReadError(f"the file ends inside {info.name!r}")
                    if name[1].startswith("/") or ".." in PurePosixPath(name[1]).parts:
                        raise DataError(
                            f"the member {info.name!r} has a name that leads out of the shard", "unsafe name"
                        )
                    if found and name[1] != key:
                        raise tarfile.ReadError(f"members of {key!r} and {name[1]!r} where one sample should be")
                    key = name[1]
                    found[name[2]] = Stretch(path, info.offset_data, info.size)
    except DataError:
        raise
    except Exception as error:  # tarfile has its own errors, and KeyError, ValueError, OSError on damaged headers
        raise DataError(f"{type(error).__name__}: {error}", UNREADABLE) from error
    if not found:
        raise DataError("no plain file where a sample should be", UNREADABLE)
    return key, found


def _headers(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """Every header up to `end`."""
    while True:
        info = tar.next()
        if info is None:
            raise tarfile.ReadError("the headers end before the sample does")
        yield info
        if tar.offset >= end:
            return
