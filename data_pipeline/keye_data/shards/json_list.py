"""The elements of a JSON list, however long the file: one of them is held at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from keye_data.errors import DataError

CHUNK = 1 << 20  # characters
LONGEST = 1 << 26  # characters of one element
MALFORMED = "malformed record"


def elements(path: Path) -> Iterator[str]:
    """The text of each object in the list that `path` holds. DataError naming the element where it is no such list."""
    decoder = json.JSONDecoder()
    count = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = _more(file, "")
            if not text.startswith("["):
                raise DataError(f"{path}: expected a JSON list of records", MALFORMED)
            text = _more(file, text[1:])
            while not text.startswith("]"):
                if count:
                    if not text.startswith(","):
                        raise DataError(f"{path}, element {count}: expected , or ] behind it", MALFORMED)
                    text = _more(file, text[1:])
                count += 1
                if not text.startswith("{"):
                    raise DataError(f"{path}, element {count}: expected an object", MALFORMED)
                text, end = _element(file, text, decoder, f"{path}, element {count}")
                yield text[:end]
                text = _more(file, text[end:])
            if _more(file, text[1:]):
                raise DataError(f"{path}: there is something behind the list", MALFORMED)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, element {count + 1} or after: not UTF-8: {error}", MALFORMED) from error


def _more(file, text: str) -> str:  # type: ignore[no-untyped-def]
    """`text` without leading space, and more of the file where nothing is left; empty at the end."""
    text = text.lstrip()
    while not text:
        chunk = file.read(CHUNK)
        if not chunk:
            return ""
        text = chunk.lstrip()
    return text


def _element(file, text: str, decoder: json.JSONDecoder, where: str) -> tuple[str, int]:  # type: ignore[no-untyped-def]
    """The text, read on until its first element is whole, and where that ends."""
    while True:
        try:
            return text, decoder.raw_decode(text)[1]
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply", MALFORMED) from error
        except ValueError as error:
            # Twice as much each time: an element that is never whole is parsed a few times, not thousands of times.
            more = file.read(max(CHUNK, len(text)))
            if not more or len(text) > LONGEST:
                why = error if not more else f"longer than {LONGEST} characters, or {error}"
                raise DataError(f"{where}: not JSON: {why}", MALFORMED) from error
            text += more
