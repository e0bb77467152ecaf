"""Chain of thought in answers: where it stands in a message, and its removal.

It comes as `reasoning_content` beside an answer's content, or inside the content as `<think>...</think>`. The opening tag may
be missing: templates of thinking models write it into the prompt.
"""

from __future__ import annotations

import re
from typing import Any

from keye_data.conversation import MALFORMED
from keye_data.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(rf"{OPEN}.*?{CLOSE}\s*", re.DOTALL)


def with_thinking(messages: list[dict[str, Any]], name: str, keep: bool) -> list[dict[str, Any]]:
    """Normalised messages whose answers hold their chain of thought in the content (`keep`), or none of it.

    Raises DataError naming the sample: thinking that does not end, or nothing but thinking, cannot be taken out.
    """
    return [
        _answer(message, f"{name}, message {i}", keep) if message["role"] == "assistant" else message
        for i, message in enumerate(messages)
    ]


def _answer(message: dict[str, Any], where: str, keep: bool) -> dict[str, Any]:
    message = dict(message)
    thoughts = message.pop("reasoning_content", None)
    content = message["content"]
    if keep:
        return {**message, "content": _before(f"{OPEN}\n{thoughts}\n{CLOSE}\n\n", content) if thoughts else content}
    if isinstance(content, str):
        answer: Any = _without(content, where)
        empty = not answer
    else:
        answer = [{**p, "text": _without(p["text"], where)} if p["type"] == "text" else p for p in content]
        empty = not any(p.get("text", p) for p in answer)
    if empty and not message.get("tool_calls") and (thoughts or answer != content):
        raise DataError(f"{where}: nothing is left of the answer without its chain of thought", "no answer")
    return {**message, "content": answer}


def _before(text: str, content: Any) -> Any:
    return text + content if isinstance(content, str) else [{"type": "text", "text": text}, *content]


def _without(text: str, where: str) -> str:
    if CLOSE not in text and OPEN not in text:
        return text
    text = _BLOCK.sub("", text).rpartition(CLOSE)[2].lstrip()
    if OPEN in text:
        raise DataError(f"{where}: {OPEN} without {CLOSE}; close it, or set data.keep_thinking to true", MALFORMED)
    return text
