"""The packet table of a clip: what a demuxer alone tells, without decoding.

It gives every frame its index and time, and says which packets a frame needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from keye_data.errors import DataError

from .container import DamagedVideo, Source, opened, refuse_cut_short, source_name

MAX_PACKETS = 20_000_000
# Only these say reliably, packet by packet, when a frame is shown.
TIMED_FORMATS = {"mov", "mp4", "matroska", "webm", "ivf", "nut"}


@dataclass
class PacketTable:
    """One row per packet of the picture stream, in decode order (N rows)."""

    pts: np.ndarray  # int64 [N], units of time_base
    size: np.ndarray  # int64 [N], bytes
    sync: np.ndarray  # bool [N]: decoding can start here, and nothing later needs anything earlier
    hidden: np.ndarray  # bool [N]: decoded, never shown (VP8's alternate reference)
    discard: np.ndarray  # bool [N]: before the start of the edit list: decoded, not shown
    duration: np.ndarray  # int64 [N], units of time_base; 0 where not stated
    pos: np.ndarray  # int64 [N], first byte in the file; -1 where not known
    time_base: Fraction
    codec: str
    exact: bool  # False: pts cannot be trusted, so that frames are found by decoding from the start

    @property
    def frames(self) -> np.ndarray:
        """int64 [F]: the packet of each frame, by time of presentation."""
        shown = np.flatnonzero(~(self.hidden | self.discard))
        return shown[np.argsort(self.pts[shown], kind="stable")]

    def needed(self, packets: np.ndarray) -> np.ndarray:
        """bool [N]: the packets that must be decoded to see `packets` (int64, decode-order positions)."""
        starts = np.flatnonzero(self.sync)
        first = starts[np.maximum(np.searchsorted(starts, packets, side="right") - 1, 0)]
        edges = np.zeros(len(self.pts) + 1, np.int64)
        np.add.at(edges, first, 1)
        np.add.at(edges, packets + 1, -1)
        return np.cumsum(edges[:-1]) > 0


def scan(src: Source) -> PacketTable:
    """The packet table of a path or of bytes. Reads everything, decodes nothing. DataError when damaged or cut short."""
    refuse_cut_short(src)
    with opened(src) as (container, stream):
        return scan_open(container, stream, source_name(src))


def scan_open(container: InputContainer, stream: VideoStream, name: str) -> PacketTable:
    codec = codec_name(stream)
    rows: list[tuple[int, int, int, int, bool, bool, bool]] = []
    timed = not TIMED_FORMATS.isdisjoint(container.format.name.split(","))
    is_random_access = _random_access(codec, stream.codec_context.extradata)
    is_hidden = _never_shown(codec, stream.codec_context.extradata)
    damaged, dts = 0, None
    for packet in demux(container, stream):
        # An edit list that plays a part twice goes back in time: nothing can be sought or cut there.
        timed &= packet.pts is not None and (dts is None or packet.dts is None or packet.dts > dts)
        dts = dts if packet.dts is None else packet.dts
        damaged += packet.is_corrupt
        hidden = is_hidden(packet)
        sync = packet.is_keyframe and is_random_access(packet)
        pos = -1 if packet.pos is None else packet.pos
        rows.append((packet.pts or 0, packet.size, packet.duration or 0, pos, sync, hidden, packet.is_discard))
        if len(rows) > MAX_PACKETS:
            raise DataError(f"video {name}: more than {MAX_PACKETS} packets; cut it into segments", "too large")
    if not rows:
        raise DamagedVideo(f"video {name}: holds no frames")
    stated = _stated_packets(container, stream)
    if damaged or len(rows) < stated:
        raise DamagedVideo(
            f"video {name}: is damaged or cut short: {len(rows) - damaged} of {stated} packets can be read"
        )
    columns = list(zip(*rows))
    pts, size, duration, places = (np.array(column, np.int64) for column in columns[:4])
    sync_, hidden_, discard = (np.array(column, bool) for column in columns[4:])
    # A start is clean only if nothing behind it in decode order is shown before it (open GOP).
    sync_ &= np.minimum.accumulate(pts[::-1])[::-1] == pts
    shown = pts[~(hidden_ | discard)]
    exact = bool(timed and sync_[0] and len(np.unique(shown)) == len(shown) > 0)
    time_base = Fraction(stream.time_base or 1)
    return PacketTable(pts, size, sync_, hidden_, discard, duration, places, time_base, codec, exact)


def codec_name(stream: VideoStream) -> str:
    """h264, hevc, av1, ...: the codec's own name, whichever library decodes it here."""
    return stream.codec_context.codec.canonical_name


def _stated_packets(container: InputContainer, stream: VideoStream) -> int:
    """How many packets the container promises; 0 where it does not. What an edit list leaves out is not in MP4's index.

    AVI counts ticks without a frame too; `refuse_cut_short` knows its length better.
    """
    if container.format.name == "avi":
        return 0
    if container.format.name.startswith("mov") and len(stream.index_entries):
        return min(stream.frames, len(stream.index_entries))
    return stream.frames


def _never_shown(codec: str, extradata: bytes | None) -> Callable[[Packet], bool]:
    """Says of each packet in turn whether it is decoded and not shown.

    VP8 says so itself. HEVC's leading pictures behind a broken link (a cut in an open group) lack their references, and
    decoders drop them.
    """
    if codec == "vp8":
        return lambda packet: packet.size > 0 and not bytes(packet)[0] & 16
    if codec != "hevc":
        return lambda packet: False
    prefix = _prefix(codec, extradata)
    broken = False

    def hidden(packet: Packet) -> bool:
        nonlocal broken
        kind = next((kind for head in _unit_heads(bytes(packet), prefix) if (kind := (head >> 1) & 63) < 32), 32)
        if 16 <= kind <= 23:
            broken = kind <= 18
        return broken and kind in (8, 9)

    return hidden


def _prefix(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit; 0: start codes."""
    extra = extradata or b""
    if extra[:1] != b"\x01":
        return 0
    at = 4 if codec == "h264" else 21
    return (extra[at] & 3) + 1 if len(extra) > at else 4


def _random_access(codec: str, extradata: bytes | None) -> Callable[[Packet], bool]:
    """Says of a key packet whether decoding can really start there: H.264 and HEVC mark pictures that are no clean start."""
    if codec not in ("h264", "hevc"):
        return lambda packet: True
    prefix = _prefix(codec, extradata)

    def clean(packet: Packet) -> bool:
        for head in _unit_heads(bytes(packet), prefix):
            kind = head & 31 if codec == "h264" else (head >> 1) & 63
            if codec == "h264" and 1 <= kind <= 5:
                return kind == 5
            if codec == "hevc" and kind < 32:
                return 16 <= kind <= 20
        return False

    return clean


def _unit_heads(data: bytes, prefix: int) -> Iterator[int]:
    """First byte of every NAL unit."""
    at = 0
    while prefix and at + prefix < len(data):
        yield data[at + prefix]
        at += prefix + int.from_bytes(data[at : at + prefix], "big")
    while not prefix and (at := data.find(b"\0\0\1", at)) >= 0 and at + 3 < len(data):
        yield data[at + 3]
        at += 3


def demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The packets of the stream without the demuxer's end mark."""
    return (packet for packet in container.demux(stream) if packet.size or packet.pts is not None)
