"""Bytes that may still lie in a file: what buffers hold instead of films."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

from keye_data.errors import DataError

UNREADABLE = "unreadable shard"


@dataclass(frozen=True)
class Stretch:
    """`size` bytes of a file from `offset` on."""

    path: str
    offset: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self) -> bytes:
        """The bytes. DataError ("unreadable shard") when the file is gone or ends before."""
        with self.open() as file:
            return file.read(self.size)

    def open(self) -> BinaryIO:
        """A file that holds these bytes and nothing else; they are read as they are asked for. DataError as in `read`."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  # the window closes it
            missing = self.offset + self.size - os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})", UNREADABLE) from error
        if missing > 0:
            file.close()
            raise DataError(
                f"{self.path}: ends {missing} bytes before the end of a member; build the shard again", UNREADABLE
            )
        return io.BufferedReader(_Window(file, self.offset, self.size), 1 << 16)


Blob: TypeAlias = "bytes | Stretch"


def content(blob: Blob) -> bytes:
    return blob.read() if isinstance(blob, Stretch) else blob


class _Window(io.RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
