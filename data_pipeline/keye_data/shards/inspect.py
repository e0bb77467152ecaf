"""Looking into a shard folder: its samples one by one, without an index where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_data.conversation import media_names, normalise
from keye_data.errors import DataError
from keye_data.shards.reports import SAMPLES, lines
from keye_data.shards.tars import tar_records
from keye_data.stretch import Stretch
from keye_data.video.stored import StoredClip


@dataclass
class Sample:
    key: str
    shard: str
    members: dict[str, Stretch]  # by what follows the key; read when needed
    line: dict[str, Any]  # of samples.jsonl; empty where there is none

    @property
    def conversation(self) -> dict[str, Any]:
        """DataError where its .json member is missing or no conversation."""
        try:
            found = json.loads(self.members["json"].read())
            if "text" not in found:
                found["messages"] = normalise(found["messages"], f"{self.shard}, sample {self.key}")
        except DataError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{self.shard}, sample {self.key}: no readable .json member: {error!r}") from error
        return found

    @property
    def media(self) -> list[tuple[str, str]]:
        """(kind, name) of its pictures and clips."""
        return media_names(self.conversation.get("messages", []))

    def seconds(self, name: str) -> float:
        """How long a clip is. DataError where it cannot be read."""
        listed = {entry["name"]: entry.get("seconds") for entry in self.line.get("media", [])}
        return listed[name] if listed.get(name) is not None else StoredClip(self.members, name).info.duration

    @property
    def text(self) -> str:
        """What is said in it."""
        conversation = self.conversation
        if "text" in conversation:
            return conversation["text"]
        said = []
        for message in conversation["messages"]:
            content = message["content"]
            said += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        return " / ".join(said)


def samples(folder: Path) -> Iterator[Sample]:
    """Every sample of a shard folder, in order. DataError for a folder without shards, and where a shard is damaged."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        what = "holds no shards (*.tar)" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; build them with `python tools/build_shards.py SOURCE --out {folder}`")
    index = _index(folder / SAMPLES)
    line = next(index, None)
    for path in shards:
        for raw in tar_records(path):
            if raw.format == "unreadable":
                raise DataError(raw.payload)
            key = raw.place.removeprefix("sample ")
            members = {name[len(key) + 1 :]: Stretch(str(path), offset, size) for name, offset, size in raw.payload}
            known = line if line and (line["key"], line["shard"]) == (key, path.name) else {}
            if known:
                line = next(index, None)
            yield Sample(key, path.name, members, known)


def _index(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        try:
            yield from lines(path)
        except ValueError as error:
            raise DataError(f"{path}: not a list of samples: {error}") from error
