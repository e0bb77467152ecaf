"""What a source is, and its records one by one, not yet understood: nothing of their media is read here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from keye_data.errors import DataError
from keye_data.shards.json_list import elements
from keye_data.shards.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from keye_data.shards.records import Raw
from keye_data.shards.tars import tar_records

BOM = b"\xef\xbb\xbf"
LISTS = (".jsonl", ".json")
JSON_FORMATS = ("openai", "llava", "sharegpt")


def detect(source: Path) -> str:
    """One of options.FORMATS, told from the kind of files and the first record. DataError for what holds nothing known."""
    files = _files(source, None)
    if not files:
        return "captions"
    if others := {path.suffix for path in files} - {files[0].suffix}:
        raise DataError(
            f"{source}: it holds files of several kinds ({', '.join(sorted({files[0].suffix, *others}))}); build them apart, or "
            "choose with --format"
        )
    return "webdataset" if files[0].suffix == ".tar" else _style(files[0])


def read_source(source: Path, format: str) -> Iterator[Raw]:
    """The records of a source, in the order of file names and lines."""
    if format == "captions":
        yield from _captions(source)
        return
    files = _files(source, format)
    if not files:
        raise DataError(f"{source}: it holds nothing that --format {format} fits")
    for path in files:
        yield from tar_records(path) if format == "webdataset" else _json(path, format)


def _files(source: Path, format: str | None) -> list[Path]:
    """The lists or tars that make up a source; none for a folder of captioned files."""
    suffixes = LISTS if format in JSON_FORMATS else (".tar",) if format else (*LISTS, ".tar")
    if source.is_file():
        if source.suffix in suffixes:
            return [source]
        raise DataError(f"{source}: expected a folder or a file ending in {', '.join(suffixes)}")
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    if not format and (source / ".nv-meta").is_dir():  # a shard folder, whatever lists lie beside its shards
        suffixes = (".tar",)
    return sorted(path for suffix in suffixes for path in source.glob(f"*{suffix}"))


def _style(path: Path) -> str:
    """How the first record of a list is written; "openai" where it cannot be told, whose reader then says what is wrong."""
    try:
        record = json.loads(next((raw.payload for raw in _json(path, "openai")), b"{}"))
    except (ValueError, RecursionError):
        return "openai"
    if not isinstance(record, dict) or "text" in record:
        return "openai"
    if "conversations" in record:
        return "llava" if "image" in record or "video" in record else "sharegpt"
    return "sharegpt" if "images" in record or "videos" in record else "openai"


def _json(path: Path, format: str) -> Iterator[Raw]:
    """Records of a list: a JSON list or one object a line, told by the first character."""
    with path.open("rb") as file:
        head = file.read(1 << 16).removeprefix(BOM).lstrip()
    if head.startswith(b"["):
        number = 0
        try:
            for number, text in enumerate(elements(path), start=1):
                yield Raw(format, path, f"element {number}", text.encode("utf-8", "surrogatepass"))
        except DataError as error:  # the rest of the list is out of reach
            yield Raw("unreadable", path, f"element {number + 1} and all after it", str(error))
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield Raw(format, path, f"line {number}", line.strip())


def _captions(folder: Path) -> Iterator[Raw]:
    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    if not folder.is_dir():
        raise DataError(f"{folder}: --format captions needs a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise DataError(f"{folder}: neither *.jsonl, *.json or *.tar files nor pictures or clips in it")
    for path in files:
        yield Raw("captions", path, "", str(folder))
