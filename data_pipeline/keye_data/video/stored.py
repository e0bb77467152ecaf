"""How a clip lies in a shard: a packet table, and the film as it is or, when it is long, in segments.

A segment is a container of its own, remuxed from one clean start to a later one, so that a frame is found and read without
the rest of the film. The table tells what `probe` would, with the film closed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from keye_data.errors import DataError
from keye_data.stretch import Blob, content

from .api import Info, probe
from .container import Source, opened, read_source, source_bytes, source_name
from .packets import MAX_PACKETS, PacketTable, scan
from .trim import FORMATS, remux, trim

log = logging.getLogger(__name__)
VERSION = 1
TABLE = "packets"  # suffix of the table's member
SUFFIXES = {"mp4": "mp4", "webm": "webm", "matroska": "mkv"}
SECONDS, BYTES = 120.0, 32 << 20  # of a segment
COLUMNS = ("pts", "size", "duration", "pos")


@dataclass
class Part:
    """Frames of one member of a clip: `frames` are indices into `data`, a container or the place of one in a file."""

    data: Blob
    frames: list[int]


@dataclass
class StoredTable:
    """What the table's member holds."""

    table: PacketTable
    info: Info
    segments: list[tuple[str, int]]  # (suffix, its first packet); a film that was not cut: [("", 0)]
    media: dict[str, Any] = field(default_factory=dict)  # container, bytes, sha256, pixel format, rate, audio


def members(
    src: Source, *, segment_seconds: float = SECONDS, segment_bytes: int = BYTES
) -> Iterator[tuple[str, bytes]]:
    """(suffix, bytes) of each member that stands for the clip `src`: the table, then the film.

    A clip longer or larger than one segment is cut into ("000.mp4", ...), whole groups of pictures, at most so long and large
    where its groups allow; else there is one member with suffix "". The same source gives the same bytes.
    DataError for a clip that `probe` refuses.
    """
    table = scan(src)
    info = probe(src, table)
    media = _describe(src)
    cuts = _cuts(table, segment_seconds, segment_bytes)
    with tempfile.TemporaryFile() as file:
        sizes = _write_segments(src, table, cuts, file) if len(cuts) > 1 else []
        if not sizes:
            cuts = [0]
        kind = SUFFIXES[FORMATS.get(table.codec, "matroska")]
        names = [f"{i:03}.{kind}" for i in range(len(cuts))] if sizes else [""]
        yield TABLE, pack(StoredTable(table, info, list(zip(names, cuts)), media))
        if not sizes:
            yield "", source_bytes(src)
        file.seek(0)
        for name, size in zip(names, sizes):
            yield name, file.read(size)


class StoredClip:
    """The clip `name` of a sample whose members are `read`: bytes, or places in a file that are read when needed.

    A clip without a table, as other tools write them, is probed here and now.
    """

    def __init__(self, read: Mapping[str, Blob], name: str) -> None:
        self.read, self.name = read, name

    @cached_property
    def stored(self) -> StoredTable | None:
        table = self.read.get(f"{self.name}.{TABLE}")
        return None if table is None else unpack(content(table), self.name)

    @cached_property
    def info(self) -> Info:
        """As video.probe tells it. DataError."""
        return self.stored.info if self.stored else probe(self._member(""))

    def parts(self, indices: Sequence[int] | np.ndarray) -> list[Part]:
        """Where the frames `indices` lie, in that order, one part for each stretch of them in one member. Reads no film."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= self.info.n_frames)]
        if len(outside):
            raise IndexError(f"video {self.name}: frame {outside[0]} asked for, it has 0..{self.info.n_frames - 1}")
        if self.stored is None or len(self.stored.segments) == 1:
            return [Part(self._member(""), wanted.tolist())] if len(wanted) else []
        segment, local = _places(self.stored)
        edges = np.flatnonzero(np.diff(segment[wanted], prepend=-1, append=-1))
        return [
            Part(self._member(self.stored.segments[segment[wanted[a]]][0]), local[wanted[a:b]].tolist())
            for a, b in pairwise(edges.tolist())
        ]

    def cut(self, indices: Sequence[int] | np.ndarray) -> list[tuple[bytes, list[int]]]:
        """`parts`, read and trimmed: containers, and the frames' indices in each."""
        return [trim(part.data, part.frames) for part in self.parts(indices)]

    def _member(self, suffix: str) -> Blob:
        name = f"{self.name}.{suffix}" if suffix else self.name
        if name not in self.read:
            raise DataError(
                f"video {self.name}: the sample has no member {name}; build the shard again", "missing media"
            )
        return self.read[name]


def pack(stored: StoredTable) -> bytes:
    """The table's member: an npz file, columns as differences so that they compress."""
    table, info = stored.table, stored.info
    head = {
        "version": VERSION,
        "codec": table.codec,
        "exact": table.exact,
        "time_base": [table.time_base.numerator, table.time_base.denominator],
        "width": info.width,
        "height": info.height,
        "orientation": info.orientation,
        "colorspace": info.colorspace,
        "segments": stored.segments,
        "media": stored.media,
    }
    out = io.BytesIO()
    flags = table.sync.astype(np.uint8) | table.hidden.astype(np.uint8) << 1 | table.discard.astype(np.uint8) << 2
    columns: dict[str, Any] = {name: np.diff(getattr(table, name), prepend=0) for name in COLUMNS}
    columns["head"] = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(out, flags=flags, times=np.empty(0) if table.exact else info.timestamps, **columns)
    return out.getvalue()


def unpack(data: bytes, name: str) -> StoredTable:
    """The inverse of `pack`. DataError naming the clip `name` when the member is damaged or of another version."""
    broken = f"video {name}: its packet table cannot be read"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > 64 * MAX_PACKETS:
                raise ValueError("too large")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        head = json.loads(arrays["head"].tobytes())
        if head["version"] != VERSION:
            raise DataError(
                f"{broken}: version {head['version']}, not {VERSION}; build the shards again", "corrupt clip"
            )
        pts, size, duration, pos = (np.cumsum(arrays[column], dtype=np.int64) for column in COLUMNS)
        sync, hidden, discard = (arrays["flags"] & bit > 0 for bit in (1, 2, 4))
        base = Fraction(*head["time_base"])
        table = PacketTable(pts, size, sync, hidden, discard, duration, pos, base, head["codec"], head["exact"])
        times = arrays["times"]
        if table.exact:
            shown = pts[table.frames]
            times = (shown - shown[0]).astype(np.float64) * float(base)
        turn = head["orientation"]
        how = (bool(turn[0]), bool(turn[1]), bool(turn[2]))
        info = Info(len(times), times, head["width"], head["height"], table.codec, how, head["colorspace"])
        segments = [(str(suffix), int(first)) for suffix, first in head["segments"]]
        if not len(times) or not segments:
            raise ValueError("no frames")
        return StoredTable(table, info, segments, head["media"])
    except DataError:
        raise
    except Exception as error:  # zip, zlib, numpy and JSON raise errors of their own on damaged bytes
        raise DataError(f"{broken} ({type(error).__name__}: {error}); build the shard again", "corrupt clip") from error


def _cuts(table: PacketTable, seconds: float, size: int) -> list[int]:
    """First packets of the segments: clean starts before which nothing is shown later."""
    if not table.exact:
        return [0]
    latest = np.maximum.accumulate(table.pts)
    starts = np.flatnonzero(table.sync[1:] & (latest[:-1] < table.pts[1:])) + 1
    ends = [*starts[1:].tolist(), len(table.pts)]
    before = np.concatenate(([0], np.cumsum(table.size)))
    cuts = [0]
    for start, end in zip(starts.tolist(), ends):
        length = (latest[end - 1] - table.pts[cuts[-1]]) * float(table.time_base)
        if length > seconds or before[end] - before[cuts[-1]] > size:
            cuts.append(start)
    return cuts


def _write_segments(src: Source, table: PacketTable, cuts: list[int], file: Any) -> list[int]:
    """Writes the segments one behind the other -> their sizes; none, and a warning, where a segment does not hold the same."""
    sizes = []
    for start, stop in zip(cuts, [*cuts[1:], len(table.pts)]):
        keep = np.zeros(len(table.pts), bool)
        keep[start:stop] = True
        data = remux(src, table, keep)
        copy, shown = scan(data), ~table.hidden[start:stop]
        order = np.argsort(table.pts[start:stop][shown], kind="stable")
        same = (
            copy.exact
            and np.array_equal(copy.hidden, ~shown)
            and not copy.discard.any()
            and np.array_equal(order, np.argsort(copy.pts[shown], kind="stable"))
        )
        if not same:
            log.warning("video %s: its packets do not survive cutting; it is stored whole", source_name(src))
            return []
        file.write(data)
        sizes.append(len(data))
    return sizes


def _places(stored: StoredTable) -> tuple[np.ndarray, np.ndarray]:
    """Of each frame its segment and its index in that segment, where what an edit list hid is shown: int64 [F] each."""
    table = stored.table
    firsts = np.array([first for _, first in stored.segments])
    segment = np.searchsorted(firsts, np.arange(len(table.pts)), side="right") - 1
    shown = np.flatnonzero(~table.hidden)
    shown = shown[np.lexsort((table.pts[shown], segment[shown]))]
    rank = np.zeros(len(table.pts), np.int64)
    rank[shown] = np.arange(len(shown)) - np.searchsorted(segment[shown], segment[shown])
    return segment[table.frames], rank[table.frames]


def _describe(src: Source) -> dict[str, Any]:
    """Media metadata, and the hash by which duplicates are found."""
    with read_source(src) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        size = file.seek(0, os.SEEK_END)
    with opened(src) as (container, stream):
        return {
            "container": container.format.name,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "pixel_format": stream.codec_context.pix_fmt,
            "rate": float(stream.average_rate or 0),
            "audio": bool(container.streams.audio),
        }
