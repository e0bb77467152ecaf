"""The PyAV backend, FFmpeg on the CPU: the default, and the one that says what every other must return."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from .container import Broken, Source, check_size, opened, source_name
from .frames import CHUNK, orientation, resize, rgb, turn
from .packets import PacketTable, demux
from .reading import read


def decode(src: Source, table: PacketTable, wanted: np.ndarray, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], f <= CHUNK, of `wanted` (int64 [F], ascending, no repeats). One native frame is alive at a time."""
    done: list[np.ndarray] = []
    with opened(src) as (container, stream):
        for at, (place, frame) in enumerate(wanted_frames(container, stream, table, wanted)):
            if frame.is_corrupt:
                raise Broken(f"frame {wanted[place]} is damaged")
            if place != at:
                raise Broken(f"frame {wanted[place]} comes before frame {wanted[at]}")
            check_size(frame.width, frame.height, f"video {source_name(src)}")
            pixels = turn(rgb(frame), orientation(frame))[None]
            if size is None:  # what the first frame measures, should the stream change its size later
                size = pixels.shape[1:3]
            done.append(resize(pixels, size))
            if len(done) == CHUNK or at + 1 == len(wanted):
                yield np.concatenate(done)
                done.clear()


def wanted_frames(
    container: InputContainer, stream: VideoStream, table: PacketTable, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(place in `wanted`, frame) for each; Broken, naming a frame that the decoder does not give."""
    missing = set(range(len(wanted)))
    places: dict[int, int]
    if table.exact:
        packets = table.frames[wanted]
        places = {int(pts): i for i, pts in enumerate(table.pts[packets])}
        found = (
            (places.pop(f.pts, None), f)
            for f in _runs_decoded(container, stream, table, table.needed(packets))
            if f.pts is not None
        )
    else:
        places = {int(index): i for i, index in enumerate(wanted)}
        found = ((places.pop(i, None), f) for i, f in enumerate(all_frames(container, stream)))
    for place, frame in found:
        if place is not None:
            missing.discard(place)
            yield place, frame
            if not missing:
                return
    raise Broken(f"frame {wanted[min(missing)]} cannot be decoded")


def _runs_decoded(
    container: InputContainer, stream: VideoStream, table: PacketTable, keep: np.ndarray
) -> Iterator[av.VideoFrame]:
    codec = stream.codec_context
    for item in read(container, stream, table, keep):
        if item is not None:
            yield from codec.decode(item[1])
        else:
            yield from codec.decode(None)
            codec.flush_buffers()


def all_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Every shown frame from the start, in order: the way for streams whose packets carry no usable times."""
    for packet in demux(container, stream):
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)
