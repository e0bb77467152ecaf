"""Source folders -> WebDataset shards with Energon's index.

A sample is the members `{key}.json` (the conversation) and `{key}.0.mp4`, `{key}.1.png`, ... (its media, under the names that
the conversation uses: "0.mp4", "1.png", ...). The same source gives the same shards, byte for byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import webdataset

from keye_data.conversation import normalise
from keye_data.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")
DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


@dataclass
class Record:
    """One sample on its way into a shard."""

    conversation: dict[str, Any]
    media: dict[str, Path]  # name in the conversation -> file


def build_shards(
    source: Path, out: Path, samples_per_shard: int = 1000, on_sample: Callable[[], None] | None = None
) -> tuple[int, int]:
    """Writes the shards of `source` to the new folder `out`, which appears whole or not at all.

    `source` is a JSONL file of conversations or plain documents, a folder with such files (media paths are relative to the
    file), or a folder of pictures and clips with a caption in a .txt file of the same name. Returns (samples, shards).
    Raises DataError naming the file and line at fault.
    """
    if samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {samples_per_shard}: it must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: it exists already; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "shards"
        folder.mkdir()
        samples, shards = _write(read_source(source), folder, samples_per_shard, on_sample)
        if samples == 0:
            raise DataError(f"{source}: it holds no sample")
        _index(folder, shards)
        if out.exists():
            out.rmdir()
        folder.replace(out)
    return samples, len(shards)


def read_source(source: Path) -> Iterator[Record]:
    """The samples of a source, in the order of file names and lines."""
    if source.is_file():
        yield from _read_jsonl(source)
        return
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    lists = sorted(source.glob("*.jsonl"))
    for path in lists:
        yield from _read_jsonl(path)
    if not lists:
        yield from _read_captions(source)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict) or ("messages" in record) == ("text" in record):
                raise DataError(f"{where}: expected an object with either `messages` or `text`")
            media: dict[str, Path] = {}
            if "messages" in record:
                messages = normalise(record["messages"], where, _Renamer(path.parent, where, media))
                record = {**record, "messages": messages}
            elif not isinstance(record["text"], str):
                raise DataError(f"{where}: `text` must be text")
            yield Record(record, media)


def _read_captions(folder: Path) -> Iterator[Record]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{folder}: neither *.jsonl files nor pictures or clips in it")
    for path in files:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise DataError(f"{path}: its caption {caption.name} is missing; add it or take the file out of the folder")
        kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
        messages = [
            {"role": "user", "content": [{"type": kind, kind: path.relative_to(folder).as_posix()}]},
            {"role": "assistant", "content": caption.read_text(encoding="utf-8").strip()},
        ]
        media: dict[str, Path] = {}
        yield Record({"messages": normalise(messages, str(caption), _Renamer(folder, str(path), media))}, media)


class _Renamer:
    """Gives the media of one sample their member names, and notes which file each is."""

    def __init__(self, root: Path, where: str, media: dict[str, Path]) -> None:
        self.root, self.where, self.media = root, where, media

    def __call__(self, kind: str, name: str) -> str:
        path = self._inside(name)
        for member, known in self.media.items():
            if known == path:
                return member
        member = f"{len(self.media)}{path.suffix.lower()}"
        self.media[member] = path
        return member

    def _inside(self, name: str) -> Path:
        """The file `name`, which must not lead out of the folder, not by a link either."""
        if (
            PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
            or "://" in name
            or name.startswith("data:")
        ):
            raise DataError(f"{self.where}: {name[:80]!r} must be a path below {self.root}")
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{self.where}: the media file {path} is missing")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise DataError(f"{self.where}: {name!r} leads out of {self.root} through a link")
        if not path.suffix or not path.suffix[1:].isalnum():
            raise DataError(f"{self.where}: {name!r} needs an extension such as .mp4 or .png")
        return path


def _write(
    records: Iterator[Record], folder: Path, samples_per_shard: int, on_sample: Callable[[], None] | None
) -> tuple[int, list[str]]:
    samples = 0
    shards: list[str] = []
    with contextlib.ExitStack() as stack:
        for record in records:
            if samples % samples_per_shard == 0:
                stack.close()
                shards.append(f"shard-{len(shards):06d}.tar")
                file = stack.enter_context((folder / shards[-1]).open("wb"))
                # fixed owner and time: the bytes depend on the source alone
                writer = webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
                stack.callback(writer.close)
            members = {name: path.read_bytes() for name, path in record.media.items()}
            text = json.dumps(record.conversation, ensure_ascii=False, sort_keys=True)
            writer.write({"__key__": f"{samples:09d}", "json": text.encode("utf-8"), **members})
            samples += 1
            if on_sample:
                on_sample()
    return samples, shards


def _index(folder: Path, shards: list[str]) -> None:
    """What `energon prepare` writes: sample counts and offsets, all shards in the training split."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    logging.getLogger("megatron.energon").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder,
            shards,
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=min(4, len(shards), os.cpu_count() or 1),
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET_YAML, encoding="utf-8")
