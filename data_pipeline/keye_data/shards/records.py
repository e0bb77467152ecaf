"""A sample on its way from a source into a shard: as it stands there, and as it is understood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from keye_data.shards.media import MediaFile


@dataclass(frozen=True)
class Raw:
    """A record as it stands in its source: cheap to read, to hold and to send to another process."""

    format: str  # one of options.FORMATS, or "unreadable": payload says why
    file: Path  # where it stands; the picture or clip itself among captioned ones
    place: str  # inside that file: "line 3"
    payload: Any  # JSON bytes | the folder of a captioned file | [(member, offset, size)] of a tar | a message

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}, {self.place}" if self.place else str(self.file)

    def origin(self, source: Path) -> str:
        """As `where`, and the same wherever the source lies."""
        name = self.file.relative_to(source).as_posix() if source.is_dir() else self.file.name
        return f"{name}, {self.place}" if self.place else name


@dataclass
class Record:
    """One sample, checked: its conversation or document and the files of its media."""

    conversation: dict[str, Any]
    media: dict[str, MediaFile]  # name in the conversation -> file


def fingerprint(raws: Sequence[Raw], source: Path) -> str:
    """Two lists of records with the same text are the same work."""
    digest = sha256()
    for raw in raws:
        payload = "" if raw.format == "captions" else raw.payload
        digest.update(repr((raw.format, raw.origin(source), payload)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
