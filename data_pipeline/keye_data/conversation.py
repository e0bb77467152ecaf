"""Conversations in OpenAI's form: {"messages": [{"role": ..., "content": text or parts}, ...]}.

A part is {"type": "text", "text": ...}, {"type": "image", "image": NAME} or {"type": "video", "video": NAME}; OpenAI's
{"type": "image_url", "image_url": {"url": NAME}} and its video twin mean the same. A plain document is {"text": ...}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keye_data.errors import DataError
from keye_data.tokenizer import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

ROLES = ("system", "user", "assistant", "tool")
# Text that holds one of these would change the structure of the conversation or the number of its pictures.
CONTROL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
MALFORMED = "malformed conversation"


def normalise(messages: Any, name: str, rename: Callable[[str, str], str] | None = None) -> list[dict[str, Any]]:
    """The messages with every part in the short form; `rename(kind, media name)` may give media another name.

    `name` is the sample's, for messages. Raises DataError saying what is wrong where.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name}: `messages` must be a list with at least one message", MALFORMED)
    return [_message(message, f"{name}, message {i}", rename) for i, message in enumerate(messages)]


def media_names(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(kind, name) of every picture and clip of normalised messages, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def _message(message: Any, where: str, rename: Callable[[str, str], str] | None) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"{where}: `role` must be one of {', '.join(ROLES)}", MALFORMED)
    content, thoughts = message.get("content"), message.get("reasoning_content")
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise DataError(f"{where}: `reasoning_content` must be text", MALFORMED)
        _text(thoughts, where)
    if isinstance(content, str):
        return {**message, "content": _text(content, where)}
    if not isinstance(content, list):
        raise DataError(f"{where}: `content` must be text or a list of parts", MALFORMED)
    return {**message, "content": [_part(part, f"{where}, part {i}", rename) for i, part in enumerate(content)]}


def _part(part: Any, where: str, rename: Callable[[str, str], str] | None) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _text(part["text"], where)}
    if kind in ("image", "image_url", "video", "video_url"):
        value = part.get(kind)
        media = value.get("url") if isinstance(value, dict) else value
        if isinstance(media, str) and media:
            kind = kind.removesuffix("_url")
            return {"type": kind, kind: rename(kind, media) if rename else media}
    raise DataError(
        f"{where}: expected a part with type text, image or video and its value, found {str(part)[:80]}", MALFORMED
    )


def _text(text: str, where: str) -> str:
    for token in CONTROL_TOKENS:
        if token in text:
            raise DataError(
                f"{where}: the text holds the control token {token}; take it out of the source", "control token"
            )
    return text
