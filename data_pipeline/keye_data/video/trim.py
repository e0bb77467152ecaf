"""GOP trim: the packets that some frames need, remuxed without re-encoding.

A decoder that cannot seek then decodes no more than it must, and a worker ships a tenth of the bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

from .container import Source, opened, source_bytes, source_name
from .packets import PacketTable, scan
from .reading import read

# The container that carries each codec everywhere; Matroska takes the rest.
FORMATS = {"h264": "mp4", "hevc": "mp4", "mpeg4": "mp4", "av1": "mp4", "vp8": "webm", "vp9": "webm"}


def trim(src: Source, indices: Sequence[int] | np.ndarray, table: PacketTable | None = None) -> tuple[bytes, list[int]]:
    """A container with nothing but the packets that `indices` need, and the same frames' indices in it.

    Exact or not at all: a clip whose packets carry no reliable times comes back whole. `table` saves a scan.
    IndexError for an index out of range, DataError for a damaged clip.
    """
    table = table or scan(src)
    wanted = np.asarray(indices, np.int64).reshape(-1)
    if not table.exact:
        return source_bytes(src), wanted.tolist()
    frames = table.frames
    outside = wanted[(wanted < 0) | (wanted >= len(frames))]
    if len(outside):
        raise IndexError(f"video {source_name(src)}: frame {outside[0]} asked for, it has 0..{len(frames) - 1}")
    packets = frames[wanted]
    keep = table.needed(packets)
    if not len(wanted):
        return source_bytes(src), wanted.tolist()
    # What an edit list hid is shown in the new container, which has none: it counts there.
    shown = np.sort(table.pts[keep & ~table.hidden])
    return remux(src, table, keep), np.searchsorted(shown, table.pts[packets]).tolist()


def remux(src: Source, table: PacketTable, keep: np.ndarray) -> bytes:
    """A container with the kept packets (bool [N], every run beginning at a sync packet); the same bytes every time."""
    shift = int(table.pts[keep].min())
    target = io.BytesIO()
    with opened(src) as (source, stream):
        codec = table.codec
        # Matroska would write random identifiers.
        with av.open(target, "w", format=FORMATS.get(codec, "matroska"), options={"fflags": "+bitexact"}) as out:
            copy = out.add_stream_from_template(stream, opaque=True)  # no encoder is needed, and there may be none
            for item in read(source, stream, table, keep):
                if item is None:
                    continue
                packet = item[1]
                packet.pts = None if packet.pts is None else packet.pts - shift
                packet.dts = None if packet.dts is None else packet.dts - shift
                packet.stream = copy
                out.mux(packet)
    return target.getvalue()
