"""Reading a chosen set of packets, seeking where that saves work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from .container import Broken
from .packets import PacketTable, demux

SEEK_GAP = 1 << 18  # bytes: reading over fewer is cheaper than a seek


def runs(keep: np.ndarray) -> list[tuple[int, int]]:
    """bool [N] -> the (start, stop) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], keep, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def read(
    container: InputContainer, stream: VideoStream, table: PacketTable, keep: np.ndarray
) -> Iterator[tuple[int, Packet] | None]:
    """The kept packets (bool [N], every run beginning at a sync packet) with their numbers; None at the end of each run."""
    before = np.concatenate(([0], np.cumsum(table.size))).tolist()
    packets, at = demux(container, stream), 0
    for start, stop in runs(keep):
        if before[start] - before[at] > SEEK_GAP:
            packets, at = _seek(container, stream, table, start)
        for packet in packets:
            if at >= start:
                if packet.pts is not None and packet.pts != table.pts[at]:
                    raise Broken(f"packet {at} is not where the scan saw it")
                yield at, packet
            at += 1
            if at == stop:
                break
        else:
            raise Broken(f"the packets end at {at} of {stop}")
        yield None


def _seek(
    container: InputContainer, stream: VideoStream, table: PacketTable, start: int
) -> tuple[Iterator[Packet], int]:
    """A demuxer that stands at or before packet `start`, and the number of its next packet."""
    for target in (start, 0):
        container.seek(int(table.pts[target]), stream=stream, backward=True)
        packets = demux(container, stream)
        first = next(packets, None)
        # Times are unique among shown packets; a packet it cannot place makes it start over from the beginning.
        rows = np.flatnonzero((table.pts == first.pts) & (table.size == first.size)) if first else np.empty(0, int)
        if first and len(rows) == 1 and rows[0] <= start:
            return itertools.chain([first], packets), int(rows[0])
    raise Broken(f"cannot seek to packet {start}")
