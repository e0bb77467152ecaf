"""The 10,000 sample lengths that the packing benchmark packs:  python data_pipeline/benchmarks/lengths.py

Writes lengths.txt, twenty numbers a line. A seeded mix as a training stage of 32,768 tokens a row sees it: 15 % texts (log-normal,
median 900 tokens), 20 % pictures (log-normal, median 1,200, with a question), 65 % clips of log-normal duration (median 25 s) at
2 frames a second and 64 to 256 tokens a frame with a timestamp before each, long ones sampled down to what fits a row.
At least half of the lengths are above an eighth of the row: small ones alone would make packing easy.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

ROW = 32_768  # tokens
COUNT = 10_000
SEED = 20_26
FILE = Path(__file__).resolve().parent / "lengths.txt"
MARKER = 9  # tokens of a frame's timestamp, start and end


def generate(count: int = COUNT, seed: int = SEED, row: int = ROW) -> list[int]:
    """Token counts, each 1..row."""
    draw = random.Random(seed)
    return [max(1, min(row, round(_length(draw, row)))) for _ in range(count)]


def _length(draw: random.Random, row: int) -> float:
    kind = draw.random()
    if kind < 0.15:
        return draw.lognormvariate(math.log(900), 1.0)
    talk = draw.lognormvariate(math.log(120), 0.8)  # the question, the answer and the headers
    if kind < 0.35:
        return talk + min(draw.lognormvariate(math.log(1200), 0.7), 20_480)
    duration = min(draw.lognormvariate(math.log(25), 1.2), 3600)
    frames = max(2, int(2 * duration))
    room = row - talk
    frames = min(frames, int(room // (64 + MARKER)))
    tokens = min(draw.choice((126, 180, 240, 253)), int(room / frames) - MARKER)  # by the clip's shape and size
    return talk + frames * (tokens + MARKER)


def read(path: Path = FILE) -> list[int]:
    """The committed list."""
    return [int(word) for word in path.read_text().split()]


def main() -> None:
    lengths = generate()
    lines = [" ".join(map(str, lengths[at : at + 20])) for at in range(0, len(lengths), 20)]
    FILE.write_text("\n".join(lines) + "\n")
    large = sum(8 * length > ROW for length in lengths) / len(lengths)
    print(f"{FILE}: {len(lengths)} lengths, {large:.1%} above an eighth of {ROW}")


if __name__ == "__main__":
    main()
