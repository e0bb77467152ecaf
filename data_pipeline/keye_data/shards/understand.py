"""From a record as it stands in a source to a checked conversation and the files of its media."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from keye_data.conversation import MALFORMED, normalise
from keye_data.errors import DataError
from keye_data.shards.dialogue import to_messages
from keye_data.shards.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaFile, MemberRenamer, Renamer
from keye_data.shards.records import Raw, Record
from keye_data.shards.tars import Member
from keye_data.stretch import Stretch


def understand(raw: Raw, media: Path | None = None, video_suffix: str | None = None) -> Record:
    """The sample that a record means. DataError naming file and line.

    `media` is the folder that media paths count from, else that of the record's file. `video_suffix` is that of the members
    that clips will be stored as, where it is not that of the files.
    """
    if raw.format == "unreadable":
        raise DataError(raw.payload, "unreadable source")
    if raw.format == "captions":
        return _captioned(raw, video_suffix)
    if raw.format == "webdataset":
        return _of_members(raw, video_suffix)
    record = _parse(raw.payload, raw.where)
    if raw.format != "openai":
        record = to_messages(record, raw.where)
    return _renamed(record, raw.where, Renamer(media or raw.file.parent, raw.where, video_suffix))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written again
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}", MALFORMED) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {str(record)[:80]}", MALFORMED)
    return record


def _renamed(record: dict[str, Any], where: str, renamer: Renamer) -> Record:
    if ("messages" in record) == ("text" in record):
        raise DataError(f"{where}: expected an object with either `messages` or `text`", MALFORMED)
    if "text" in record:
        if not isinstance(record["text"], str):
            raise DataError(f"{where}: `text` must be text", MALFORMED)
        return Record(record, {})
    return Record({**record, "messages": normalise(record["messages"], where, renamer)}, renamer.media)


def _caption(names: list[str], text: str, where: str, renamer: Renamer) -> Record:
    parts = []
    for name in names:
        kind = "image" if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else "video"
        parts.append({"type": kind, kind: name})
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": text.strip()}]
    return _renamed({"messages": messages}, where, renamer)


def _captioned(raw: Raw, video_suffix: str | None) -> Record:
    folder, path = Path(raw.payload), raw.file
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        cure = "add it or take the file out of the folder"
        raise DataError(f"{path}: its caption {caption.name} is missing; {cure}", "missing caption")
    text = _decoded(MediaFile(caption, ".txt").read(), str(caption))
    if not text.strip():
        raise DataError(f"{path}: its caption {caption.name} is empty; write one or take both out", "missing caption")
    return _caption([path.relative_to(folder).as_posix()], text, str(path), Renamer(folder, str(path), video_suffix))


def _of_members(raw: Raw, video_suffix: str | None) -> Record:
    """A sample of a tar: its .json member, else its .txt member as the caption of its media."""
    members: list[Member] = raw.payload
    parts = {PurePosixPath(name).name.partition(".")[2].lower(): (name, offset, size) for name, offset, size in members}
    if any(part.endswith(".packets") and part.removesuffix(".packets") not in parts for part in parts):
        raise DataError(
            f"{raw.where}: it holds a film in pieces; build from the film itself instead", "unreadable source"
        )
    renamer = MemberRenamer(raw.file, raw.where, members, video_suffix)
    media = [name for part, (name, *_) in parts.items() if f".{part.rpartition('.')[2]}" in _SUFFIXES]
    record: dict[str, Any] = {}
    if "json" in parts:
        record = _parse(_read(raw.file, parts["json"]), raw.where)
        if "conversations" in record or record.get("images") or record.get("videos"):
            record = to_messages(record, raw.where)
        if "messages" in record or ("text" in record and not media):
            return _renamed(record, raw.where, renamer)
    text = record.get("caption", record.get("text"))
    if "txt" in parts:
        text = _decoded(_read(raw.file, parts["txt"]), raw.where)
    if not isinstance(text, str):
        raise DataError(f"{raw.where}: neither a conversation in .json nor a caption in .json or .txt", MALFORMED)
    if not media:
        return _renamed({"text": text}, raw.where, renamer)
    return _caption(media, text, raw.where, renamer)


_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _read(tar: Path, member: Member) -> bytes:
    return Stretch(str(tar), *member[1:]).read()


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}", MALFORMED) from error
