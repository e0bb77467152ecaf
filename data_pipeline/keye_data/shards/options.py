"""What can be chosen about a build."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from keye_data.errors import DataError

FORMATS = ("captions", "openai", "llava", "sharegpt", "webdataset")
ON_ERROR = ("stop", "skip", "keep")


@dataclass(frozen=True)
class Reencode:
    """Clips made small before they are stored: H.264 in MP4, without B-frames, the times of the frames as they were."""

    fps: float = 2.0  # frames kept a second; a clip with fewer keeps all
    gop: int = 16  # frames from one key frame to the next
    height: int = 360  # pixels at most
    crf: int = 23  # x264's quality: lower is better and larger

    @classmethod
    def parse(cls, text: str) -> Reencode:
        """From "fps=2,gop=16,height=360"; what is left out keeps its default."""
        kinds = {"fps": float, "gop": int, "height": int, "crf": int}
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                values[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise DataError(f"--reencode {part!r}: expected fps=, gop=, height= or crf= and a number") from None
        chosen = cls(**values)  # type: ignore[arg-type]
        if not (0 < chosen.fps <= 240 and chosen.gop >= 1 and chosen.height >= 16 and 0 <= chosen.crf <= 51):
            raise DataError(f"--reencode {text}: fps above 0, gop of 1 or more, height of 16 or more, crf of 0 to 51")
        return chosen


@dataclass(frozen=True)
class Options:
    """How shards are built. The same source and options give the same bytes."""

    format: str | None = None  # of FORMATS; None: told by looking
    media: Path | None = None  # the folder that media paths count from; None: the folder of the file that names them
    samples_per_shard: int = 1000
    shard_bytes: int = 4 << 30  # a shard that has grown beyond this goes on in a further file
    segment_seconds: float = 120.0  # longer clips are stored in pieces of about this length
    on_error: str = "stop"  # at a bad sample: stop; skip it and list it in bad.jsonl; keep it if only its media are bad
    reencode: Reencode | None = None
    tokenizer: Path | None = None  # for token counts
    budgets: tuple[str, ...] = ()  # recipe files, or NAME=TOKENS; see tokens.py

    def check(self) -> None:
        """DataError for what cannot be."""
        if self.format is not None and self.format not in FORMATS:
            raise DataError(f"--format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.on_error not in ON_ERROR:
            raise DataError(f"--on-error {self.on_error!r} is none of {', '.join(ON_ERROR)}")
        for name in ("samples_per_shard", "shard_bytes", "segment_seconds"):
            if not getattr(self, name) > 0:  # nor NaN
                least = "above 0" if name == "segment_seconds" else "at least 1"
                raise DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be {least}")
        if self.budgets and self.tokenizer is None:
            raise DataError("--budget needs --tokenizer: a Hugging Face folder or a qwen.tiktoken file")
        if self.tokenizer is not None and not self.budgets:
            raise DataError("--tokenizer needs at least one --budget: a recipe file, or NAME=TOKENS")


def parse_bytes(text: str) -> int:
    """From "500M", "4G" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if not match:
        raise DataError(f"{text!r} is no size: expected a number of bytes, or one with K, M, G or T")
    return int(match[1]) << (10 * " KMGT".index(match[2] or " "))
