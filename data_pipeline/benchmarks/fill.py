"""How full rows are: the packer on the committed list of lengths, and on lists for shorter and longer rows beside it.

The committed list is for rows of 32,768 tokens. The others are drawn as it was, by lengths.generate, for the rows of the other
recipes: the longer the row, the more samples it takes to fill, and the larger the buffer has to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import lengths
from keye_data.packing import best_fit, rows_to_send
from keye_data.settings import DataConfig

BUFFERS = (16, 32, 64, 128, 256, 512)
OTHER_ROWS = (8_192, 65_536, 131_072, 262_144)  # tokens
TARGET = 0.97


def packed(sizes: Sequence[int], row: int, buffer: int) -> list[list[int]]:
    """Rows of indices into `sizes` as the loader makes them: the buffer is filled and packed, what can wait stays in it."""
    rows: list[list[int]] = []
    waiting: list[int] = []
    at = 0
    while at < len(sizes) or waiting:
        more = range(at, min(at + buffer - len(waiting), len(sizes)))
        at, held = more.stop, [*waiting, *more]
        lengths_held = [sizes[i] for i in held]
        groups = best_fit(lengths_held, row)
        if at < len(sizes):
            groups = rows_to_send(groups, lengths_held, row)
        sent = {i for group in groups for i in group}
        waiting = [held[i] for i in range(len(held)) if i not in sent]
        rows += [[held[i] for i in group] for group in groups]
    return rows


def gate(rows: list[list[int]], sizes: Sequence[int], row: int) -> None:
    """ValueError unless every sample is in exactly one row and no row is overfull."""
    if sorted(i for group in rows for i in group) != list(range(len(sizes))):
        raise ValueError("packing lost or repeated a sample")
    if worst := [group for group in rows if sum(sizes[i] for i in group) > row]:
        raise ValueError(f"a row holds more than {row} tokens: samples {worst[0]}")


def measure(sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """The share of tokens that are no padding: with the default buffer, and beside it with others and in other rows.

    `sizes`: lengths for rows of lengths.ROW tokens, otherwise the committed ones.
    """
    sizes = lengths.read() if sizes is None else sizes
    default = DataConfig().packing_buffer
    buffers = sorted({*BUFFERS, default})
    found = _filled(sizes, lengths.ROW, buffers)
    return {
        "settings": {"row": lengths.ROW, "lengths": len(sizes), "default_buffer": default},
        **found,
        "fill_with_default": found["fill"][str(default)],
        "target": TARGET,
        "other_rows": {str(row): _filled(lengths.generate(row=row), row, buffers) for row in OTHER_ROWS},
    }


def _filled(sizes: Sequence[int], row: int, buffers: Sequence[int]) -> dict[str, Any]:
    """How many lengths are large for rows of `row` tokens, and how full those are by buffer."""
    fills = {}
    for buffer in buffers:
        rows = packed(sizes, row, buffer)
        gate(rows, sizes, row)
        fills[str(buffer)] = sum(sizes) / (len(rows) * row)
    return {"share_above_an_eighth": sum(8 * size > row for size in sizes) / len(sizes), "fill": fills}
