"""LLaVA's and ShareGPT's records -> OpenAI-style messages.

    {"id": ..., "image": NAME or list, "video": NAME or list, "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"}, ...]}
    {"images": [...], "videos": [...], "system": ..., "conversations": [...]}   or   "messages": [{"role": ..., "content": ...}, ...]

Each placeholder `<image>` or `<video>` stands for the next file of its kind. In records that have clips and no pictures `<image>`
means a clip too, as LLaVA-Video writes it. One line break beside a placeholder belongs to it, and goes with it.
"""

from __future__ import annotations

import re
from typing import Any

from keye_data.conversation import MALFORMED
from keye_data.errors import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
OWN_KEYS = ("conversations", "messages", "image", "images", "video", "videos", "system")


def to_messages(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with `messages` in place of its turns and lists of media. DataError saying what is wrong where."""
    files = {kind: _files(record, kind, where) for kind in ("image", "video")}
    turns = _turns(record, where)
    if record.get("system"):
        turns.insert(0, ("system", record["system"]))
    only_clips = files["video"] and not files["image"]
    kinds = [
        "video" if only_clips else match[1]
        for _, value in turns
        if isinstance(value, str)
        for match in PLACEHOLDER.finditer(value)
    ]
    for kind, names in files.items():
        if kinds.count(kind) != len(names):
            found = f"{kinds.count(kind)} <{kind}> placeholders for {len(names)} files"
            raise DataError(f"{where}: {found}; each file needs exactly one", "placeholder count")
    left = {kind: iter(names) for kind, names in files.items()}
    messages = []
    for i, (role, value) in enumerate(turns):
        if not isinstance(value, str):
            raise DataError(f"{where}, turn {i}: expected text, found {str(value)[:80]}", MALFORMED)
        content: list[dict[str, str]] = []
        end = 0
        for match in PLACEHOLDER.finditer(value):
            kind = "video" if only_clips else match[1]
            content += _text(value[end : match.start()])
            content.append({"type": kind, kind: next(left[kind])})
            end = match.end()
        messages.append({"role": role, "content": [*content, *_text(value[end:])] if content else value})
    return {**{key: value for key, value in record.items() if key not in OWN_KEYS}, "messages": messages}


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def _turns(record: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected `conversations`, a list of {{from, value}}", MALFORMED)
    found = []
    for i, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"{where}, turn {i}: `from` is {speaker!r}, expected one of {known}", MALFORMED)
        found.append((ROLES[speaker], turn.get("value", turn.get("content"))))
    return found


def _files(record: dict[str, Any], kind: str, where: str) -> list[str]:
    value = record.get(kind) if record.get(kind) is not None else record.get(f"{kind}s")
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: `{kind}` holds {str(name)[:80]!r} where a file name belongs", MALFORMED)
    return names
