"""Packing: which samples share a row, and the arrays of a batch of rows.

Shapes: B rows of S tokens. A row holds documents one after another, then padding that sees nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keye_data.sample import IGNORE, EncodedSample, Media


@dataclass
class Document:
    """Where a sample stands in a batch: tokens begin <= s < end of `row`."""

    key: str
    source: str
    row: int
    begin: int
    end: int
    media: list[Media]


@dataclass
class PackedRows:
    """A batch before its pixels are decoded; the arrays are those of `Batch`."""

    input_ids: np.ndarray  # int64 [B, S]
    targets: np.ndarray  # int64 [B, S]
    position_ids: np.ndarray  # int64 [3, B, S]
    key_start: np.ndarray  # int32 [B, S]
    key_stop: np.ndarray  # int32 [B, S]
    documents: list[Document]  # in the order of their tokens


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`: longest first, each into the fullest row it fits.

    Every index is used once; the rows come in the order of their earliest sample, so that packing sorts nothing by length.
    ValueError for a length above the capacity.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sample of {length} tokens does not fit into a row of {capacity}")
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (room - length, row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def rows_to_send(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Of best_fit's rows those that are full to 1/64, the fullest, and the one with the earliest sample.

    The samples of the others wait for company that fits better; none waits longer than a buffer's worth of rounds.
    """
    room = [capacity - sum(lengths[i] for i in row) for row in rows]
    return [
        list(row) for at, row in enumerate(rows) if at == 0 or room[at] <= max(capacity // 64, min(room, default=0))
    ]


def collate(rows: Sequence[Sequence[EncodedSample]], seq_length: int, pad_id: int) -> PackedRows:
    """Rows of samples -> arrays. Targets are the next token of the same document; positions are the documents' own."""
    shape = (len(rows), seq_length)
    packed = PackedRows(
        input_ids=np.full(shape, pad_id, dtype=np.int64),
        targets=np.full(shape, IGNORE, dtype=np.int64),
        position_ids=np.zeros((3, *shape), dtype=np.int64),
        key_start=np.zeros(shape, dtype=np.int32),
        key_stop=np.zeros(shape, dtype=np.int32),
        documents=[],
    )
    for row, samples in enumerate(rows):
        begin = 0
        for sample in samples:
            end = begin + len(sample)
            if end > seq_length:
                raise ValueError(f"{sample.key}: row {row} holds more than {seq_length} tokens")
            packed.input_ids[row, begin:end] = sample.input_ids
            packed.targets[row, begin : end - 1] = sample.labels[1:]
            packed.position_ids[:, row, begin:end] = sample.position_ids
            packed.key_start[row, begin:end] = begin
            packed.key_stop[row, begin:end] = np.arange(begin + 1, end + 1)
            packed.documents.append(Document(sample.key, sample.source, row, begin, end, sample.media))
            begin = end
        packed.key_start[row, begin:] = packed.key_stop[row, begin:] = begin  # padding sees nothing
    return packed
