"""How full rows are: the packer and the default buffer of the `data` section on the committed list of lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks import lengths
from keye_data.packing import best_fit, rows_to_send
from keye_data.settings import DataConfig

BUFFERS = (16, 32, 64, 128, 256, 512)
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


def measure(sizes: Sequence[int] | None = None, row: int = lengths.ROW) -> dict[str, Any]:
    """The share of tokens that are no padding: with the default buffer, and beside it with others."""
    sizes = lengths.read() if sizes is None else sizes
    default = DataConfig().packing_buffer
    fills, seconds = {}, 0.0
    for buffer in sorted({*BUFFERS, default}):
        begin = time.process_time()
        rows = packed(sizes, row, buffer)
        if buffer == default:
            seconds = time.process_time() - begin
        gate(rows, sizes, row)
        fills[buffer] = sum(sizes) / (len(rows) * row)
    return {
        "settings": {"row": row, "lengths": len(sizes), "default_buffer": default},
        "share_above_an_eighth": sum(8 * size > row for size in sizes) / len(sizes),
        "mean_length": sum(sizes) / len(sizes),
        "fill": {str(buffer): fill for buffer, fill in fills.items()},
        "fill_with_default": fills[default],
        "microseconds_a_sample": 1e6 * seconds / len(sizes),
        "target": TARGET,
    }
