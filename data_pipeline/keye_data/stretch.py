"""Bytes that may still lie in a file: what buffers hold instead of films."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from keye_data.errors import DataError


@dataclass(frozen=True)
class Stretch:
    """`size` bytes of a file from `offset` on."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. DataError ("unreadable shard") when the file is gone or ends before."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})", "unreadable shard") from error
        if len(data) != self.size:
            raise DataError(
                f"{self.path}: ends {self.size - len(data)} bytes before the end of a member; build the shard again",
                "unreadable shard",
            )
        return data


Blob: TypeAlias = "bytes | Stretch"


def content(blob: Blob) -> bytes:
    return blob.read() if isinstance(blob, Stretch) else blob
