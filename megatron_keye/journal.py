"""A long write in files that each appear whole, so that a killed one goes on where it stopped.

Every finished file is synced to disk, renamed into place and entered with its checksum in `.journal.json`. A later
process that writes the same thing into the folder checks those files against their checksums and writes the rest.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

NAME = ".journal.json"
BLOCK = 1 << 22  # bytes read at once
SYNC = 1 << 28  # bytes after which the disk is set to work, while the next are made
Item = TypeVar("Item")
Advance = Callable[[int], object]  # told how many bytes were dealt with


def ignore(_: int) -> None:
    """An Advance for when nobody watches."""


class Journal:
    """`source`: JSON values that say what is written. Every file of `folder` that is not a finished one of it is removed."""

    def __init__(self, folder: Path, source: dict[str, Any] | None = None):
        self.folder = folder
        source = json.loads(json.dumps(source or {}))  # as it will be read
        self._said: dict[str, Any] = {"source": source, "files": {}}
        before = _read(folder)
        self.news = ""  # what there was to find, for the user
        if before["source"] == source:
            self._said = before
            self.news = f"{len(before['files'])} files that an earlier, stopped run finished are checked and kept"
        elif before["files"]:
            self.news = f"what an earlier, stopped run left in {folder} is of something else and is written again"
        # What else is there was not entered before the end came, or was written beside: it would be published too.
        for file in [file for file in folder.iterdir() if file.name not in (NAME, *self._said["files"])]:
            file.unlink()

    def finished(self, name: str, advance: Advance = ignore) -> list[Any] | None:
        """The record of a file that is there, whole and unchanged; None for one to be written."""
        entry = self._said["files"].get(name)
        file = self.folder / name
        if entry is None or not file.is_file() or file.stat().st_size != entry["size"]:
            return None
        with file.open("rb") as stream:
            if crc_and_size(stream) != [entry["crc"], entry["size"]]:
                return None
        advance(entry["size"])
        return entry["record"]

    @contextmanager
    def writing(self, name: str, record: list[Any]) -> Iterator[Summed]:
        """A stream whose content becomes the file `name` when the block ends; `record` may be filled meanwhile."""
        part = self.folder / f"{name}.part"
        with part.open("wb") as file, ThreadPoolExecutor(2) as beside:
            stream = Summed(file, beside)
            yield stream
            stream.sync()
        os.replace(part, self.folder / name)
        self._said["files"][name] = {"crc": stream.crc, "size": stream.size, "record": record}
        draft = self.folder / f"{NAME}.part"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(self._said, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.folder / NAME)

    def sums(self, name: str) -> list[int] | None:
        """crc32 and size of a finished file; None for any other."""
        entry = self._said["files"].get(name)
        return entry and [entry["crc"], entry["size"]]

    @staticmethod
    def owns(name: str) -> bool:
        """It is the journal's own and goes when the whole is written."""
        return name == NAME


class Summed:
    """Writes to a file and keeps the crc32 and the size of what went there. `beside`: two threads."""

    def __init__(self, file: BinaryIO, beside: Executor):
        self._file, self._beside, self._synced = file, beside, [beside.submit(ignore, 0)]
        self.crc, self.size = 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        before = self.size
        self.size += view.nbytes
        if view.nbytes < BLOCK // 4:
            self._file.write(view)
            self.crc = zlib.crc32(view, self.crc)
        else:
            summed = self._beside.submit(zlib.crc32, view, self.crc)
            self._file.write(view)
            self.crc = summed.result()
        if before // SYNC < self.size // SYNC and self._synced[-1].done():
            self._file.flush()
            self._synced.append(self._beside.submit(os.fsync, self._file.fileno()))
        return view.nbytes

    def sync(self) -> None:
        """All is on disk when this returns. The kernel tells of a failure once, so every answer is looked at."""
        self._file.flush()
        self._synced.append(self._beside.submit(os.fsync, self._file.fileno()))
        for answer in self._synced:
            answer.result()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the one before it is in use."""
    making, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming: Future[Any] = thread.submit(next, making, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, making, end)
            yield item


def forget(folder: Path) -> None:
    """The whole is written: nothing of the journal stays."""
    (folder / NAME).unlink(missing_ok=True)


def finished_files(folder: Path) -> int:
    """How many files a write that did not end has left in `folder` to go on from."""
    return len(_read(folder)["files"])


def _read(folder: Path) -> dict[str, Any]:
    """What the journal says; of one that cannot be read, as of none: that nothing is finished."""
    try:
        said = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return {"source": said["source"], "files": dict(said["files"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"source": None, "files": {}}


def crc_and_size(stream: BinaryIO) -> list[int]:
    """crc32 and number of the bytes from here on."""
    crc, size = 0, 0
    block = memoryview(bytearray(BLOCK))  # one for all: fresh memory costs more than reading does
    while count := stream.readinto(block):  # type: ignore[attr-defined]
        crc, size = zlib.crc32(block[:count], crc), size + count
    return [crc, size]
