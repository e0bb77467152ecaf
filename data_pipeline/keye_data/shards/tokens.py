"""How many tokens a sample takes at each stage's budget, counted by the processor that training uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.recipe import read_recipe
from keye_data.settings import DataConfig, VideoConfig
from keye_data.tokenizer import load_tokenizer

NAMED = re.compile(r"([A-Za-z][\w.-]*)=(\d+)")


def parse_budget(text: str) -> tuple[str, DataConfig]:
    """(name, settings) of a recipe file, whose `data` section counts, or of NAME=TOKENS: rows of that many tokens, all else default."""
    named = NAMED.fullmatch(text)
    if named:
        tokens = int(named[2])
        return named[1], DataConfig(tokenizer="-", seq_length=tokens, video=VideoConfig(total_tokens=tokens))
    path = Path(text)
    if not path.is_file():
        raise DataError(f"--budget {text}: no such recipe file, and not NAME=TOKENS")
    try:
        return path.stem, read_recipe(path, ["data.tokenizer=-"]).data  # --tokenizer is the one that counts
    except DataError as error:
        raise DataError(f"--budget {error}") from error


@lru_cache(maxsize=1)
def processors(tokenizer: Path, budgets: tuple[str, ...]) -> dict[str, Processor]:
    """One for each budget, by its name; they share the tokenizer."""
    named = [parse_budget(text) for text in budgets]
    names = [name for name, _ in named]
    for name, text in zip(names, budgets):
        if names.count(name) > 1:
            raise DataError(
                f"--budget {text}: there are two budgets named {name}; write NAME=TOKENS, or rename the file"
            )
    loaded = load_tokenizer(tokenizer)
    return {name: Processor(loaded, settings) for name, settings in named}


def count(
    by_name: Mapping[str, Processor], conversation: dict[str, Any], media: Mapping[str, bytes], where: str
) -> dict[str, int | None]:
    """Tokens by budget, None where the sample does not fit. DataError for what no budget can encode."""
    counts: dict[str, int | None] = {}
    for name, processor in by_name.items():
        try:
            counts[name] = len(processor.encode(conversation, media, where, "build"))
        except DataError as error:
            if error.reason != "too long":
                raise
            counts[name] = None
    return counts
