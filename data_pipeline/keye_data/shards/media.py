"""The files that a sample's pictures and clips come from, and the names they get in a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from keye_data.errors import DataError
from keye_data.stretch import Stretch

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".ts")
MISSING = "missing media"
BAD_PATH = "bad media path"
CHUNK = 1 << 20


@dataclass(frozen=True)
class MediaFile:
    """A file, or a stretch of a tar."""

    source: Path | Stretch  # what decoders take
    suffix: str  # ".mp4", lower case

    @property
    def path(self) -> Path:
        """The file, or the tar."""
        return Path(self.source.path) if isinstance(self.source, Stretch) else self.source

    def read(self) -> bytes:
        return b"".join(self._chunks())

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self) -> Iterator[bytes]:
        try:
            with self.source.open() if isinstance(self.source, Stretch) else self.source.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})", MISSING) from error


class Renamer:
    """Gives the media of one sample their member names, "0.mp4", "1.png", ..., and notes which file each is."""

    def __init__(self, root: Path, where: str, video_suffix: str | None = None) -> None:
        self.root, self.where, self.video_suffix = root, where, video_suffix
        self.media: dict[str, MediaFile] = {}

    def __call__(self, kind: str, name: str) -> str:
        file = self.find(name)
        for member, known in self.media.items():
            if known == file:
                return member
        suffix = self.video_suffix if kind == "video" and self.video_suffix else file.suffix
        member = f"{len(self.media)}{suffix}"
        self.media[member] = file
        return member

    def find(self, name: str) -> MediaFile:
        """The file `name`, which must not lead out of the folder, not by a link either."""
        parts = PurePosixPath(name).parts
        if name.startswith("data:") or "://" in name or "\0" in name or name.startswith("/") or ".." in parts:
            raise DataError(f"{self.where}: {name[:80]!r} must be a path below {self.root}", BAD_PATH)
        path = self.root / name
        try:
            there = path.is_file()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise DataError(f"{self.where}: {name[:80]!r} is no file name: {error}", BAD_PATH) from error
        if not there:
            raise DataError(f"{self.where}: the media file {path} is missing", MISSING)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise DataError(f"{self.where}: {name!r} leads out of {self.root} through a link", BAD_PATH)
        if not path.suffix or not path.suffix[1:].isalnum():
            raise DataError(f"{self.where}: {name!r} needs an extension such as .mp4 or .png", BAD_PATH)
        return MediaFile(path, path.suffix.lower())


class MemberRenamer(Renamer):
    """The same for media that are members of a tar: [(member name, offset, size)] of one sample."""

    def __init__(
        self, tar: Path, where: str, members: list[tuple[str, int, int]], video_suffix: str | None = None
    ) -> None:
        super().__init__(tar, where, video_suffix)
        self.members = members

    def find(self, name: str) -> MediaFile:
        """By the member's whole name, its base name, or what follows the sample's key."""
        wanted = PurePosixPath(name).name
        for member, offset, size in self.members:
            base = PurePosixPath(member).name
            if wanted in (base, base.partition(".")[2]):
                return MediaFile(Stretch(str(self.root), offset, size), PurePosixPath(member).suffix.lower())
        held = ", ".join(member for member, *_ in self.members)
        raise DataError(f"{self.where}: no member for {name[:80]!r}; it has {held}", MISSING)
