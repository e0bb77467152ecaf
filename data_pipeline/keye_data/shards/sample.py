"""One record -> the members of its sample and its line in the index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from keye_data.conversation import media_names
from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.shards.options import Options
from keye_data.shards.records import Record
from keye_data.shards.storing import store, store_as_it_is
from keye_data.shards.tokens import count
from keye_data.shards.writing import Members


def fill(
    record: Record, where: str, options: Options, members: Members, processors: Mapping[str, Processor]
) -> dict[str, Any]:
    """Adds the members of a sample, its conversation last, and returns what the index says: sha256, media, tokens.

    `where` names the record. DataError, naming the file, for media that cannot be read.
    """
    kinds = {name: kind for kind, name in media_names(record.conversation.get("messages", []))}
    entries = []
    for name, file in record.media.items():
        entry: dict[str, Any] = {}
        before = set(members)
        try:
            for member, data in store(name, kinds[name], file, options, entry):
                members.add(member, data)
        except DataError as error:
            fault = DataError(f"{where}: {file.path}: {error}", error.reason)
            if options.on_error != "keep":
                raise fault from error
            members.drop([member for member in members if member not in before])
            members.add(name, store_as_it_is(name, kinds[name], file, entry, fault))
        entries.append(entry)
    line: dict[str, Any] = {"sha256": _content(record, entries), "media": entries}
    if processors and not any("problem" in entry for entry in entries):
        line["tokens"] = count(processors, record.conversation, members, where)
    members.add("json", _text(record.conversation))
    return line


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8")


def _content(record: Record, entries: list[dict[str, Any]]) -> str:
    """sha256 of what a sample says and shows: its turns or text, and the digests of its media; not its id."""
    said = record.conversation.get("messages", record.conversation.get("text"))
    return hashlib.sha256(_text([said, [entry["sha256"] for entry in entries]])).hexdigest()
