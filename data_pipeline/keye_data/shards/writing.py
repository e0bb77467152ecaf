"""Files that appear whole or not at all: tars with their digest, and the members of a sample until it is known to be good."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import webdataset

IN_MEMORY = 64 << 20  # bytes of one sample; a larger one waits in a file


@contextlib.contextmanager
def whole_file(path: Path, temporary: Path) -> Iterator[IO[bytes]]:
    """`path`, written in the folder `temporary` and moved once it is complete; nothing after an error."""
    growing = temporary / f"{path.name}.{uuid4().hex}.growing"
    try:
        with growing.open("wb") as file:
            yield file
        growing.replace(path)
    finally:
        growing.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Tars:
    """Shards NAME.tar, NAME-001.tar, ..., a new one when the last has grown beyond `limit` bytes.

    As a context: at its end the last tar takes its place, after an error it vanishes.
    """

    def __init__(self, folder: Path, temporary: Path, name: str, limit: int) -> None:
        self.folder, self.temporary, self.name, self.limit = folder, temporary, name, limit
        self.written: dict[str, str] = {}  # file name -> sha256
        self._tar: _Tar | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> str:
        """Writes a sample, one member in memory at a time; returns the file name of its shard."""
        if self._tar and self._tar.size >= self.limit:
            self._close()
        if self._tar is None:
            more = f"-{len(self.written):03d}" if self.written else ""
            self._tar = _Tar(self.folder / f"{self.name}{more}.tar", self.temporary)
        for name, data in members.items():
            self._tar.add(key, name, data)
        return self._tar.name

    def _close(self) -> None:
        if self._tar:
            self.written[self._tar.name] = self._tar.close()
            self._tar = None

    def __enter__(self) -> Tars:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._close()
        elif self._tar:
            self._tar.abandon(error)


class _Tar:
    """A tar being written; `size` counts its bytes so far. `close` puts it in its place and gives its sha256."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.name, self.size = path.name, 0
        self._digest = hashlib.sha256()
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(whole_file(path, temporary))
        # fixed owner and time: the bytes depend on the source alone
        self._tar = webdataset.TarWriter(self, user="", group="", mtime=0, encoder=False)

    def write(self, data: bytes) -> int:
        """What the tar writer calls."""
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def add(self, key: str, member: str, data: bytes) -> None:
        self._tar.write({"__key__": key, member: data})

    def close(self) -> str:
        self._tar.close()
        self._stack.close()
        return self._digest.hexdigest()

    def abandon(self, error: BaseException) -> None:
        """Leaves nothing behind."""
        self._stack.__exit__(type(error), error, error.__traceback__)


class Members(Mapping[str, bytes]):
    """The members of one sample, in order, in memory or, where they are large, in a file: each is read when asked for."""

    def __init__(self, temporary: Path) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(temporary))  # noqa: SIM115
        self._spans: dict[str, tuple[int, int]] = {}  # name -> offset, size

    def add(self, name: str, data: bytes) -> None:
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(data)
        self._spans[name] = (offset, len(data))

    def drop(self, names: list[str]) -> None:
        """Forgets some; their bytes go with the rest."""
        for name in names:
            del self._spans[name]

    def close(self) -> None:
        self._file.close()

    def __getitem__(self, name: str) -> bytes:
        offset, size = self._spans[name]
        self._file.seek(offset)
        return self._file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)
