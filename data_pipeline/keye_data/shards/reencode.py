"""Clips made small before they are stored: few frames a second, short distances between key frames, a lower picture.

Training then decodes a fraction of the frames. The chosen frames keep their times, and are turned as they are to be shown.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from keye_data.shards.options import Reencode
from keye_data.video import Source, scan
from keye_data.video.api import _frame_times
from keye_data.video.container import Broken, opened, source_name
from keye_data.video.frames import orientation, resize, rgb, turn
from keye_data.video.with_pyav import all_frames, wanted_frames

SUFFIX = ".mp4"
CLOCK = 90_000  # ticks a second
BT601 = 6  # as colour spaces are numbered in H.273


def reencode(src: Source, how: Reencode) -> bytes:
    """The clip as H.264 in MP4. The same bytes each time; one frame is alive at a time. DataError for a damaged clip."""
    table = scan(src)
    target = io.BytesIO()
    with opened(src) as (source, stream):
        pts = table.pts[table.frames] if table.exact else _frame_times(all_frames(source, stream), stream)[0]
    seconds = (pts - pts[0]) * float(table.time_base)
    chosen = at_rate(seconds, how.fps)
    with opened(src) as (source, stream), av.open(target, "w", format="mp4") as out:
        copy = None
        for place, frame in wanted_frames(source, stream, table, chosen):
            if frame.is_corrupt:
                raise Broken(f"frame {chosen[place]} of {source_name(src)} is damaged")
            pixels = turn(rgb(frame), orientation(frame))
            if copy is None:
                height, width = _even(pixels.shape[0], pixels.shape[1], how.height)
                copy = _stream(out, height, width, how)
            picture = av.VideoFrame.from_ndarray(resize(pixels[None], (copy.height, copy.width))[0], format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=BT601, threads=1)
            picture.pts, picture.time_base = round(float(seconds[chosen[place]]) * CLOCK), Fraction(1, CLOCK)
            out.mux(copy.encode(picture))
        if copy is not None:
            out.mux(copy.encode())
    return target.getvalue()


def at_rate(seconds: np.ndarray, fps: float) -> np.ndarray:
    """int64 indices of the frames to keep: for each tick of 1/fps the first frame at or after it, none twice."""
    ticks = np.arange(0, float(seconds[-1]) + 1e-6, 1 / fps)
    # Containers round times: a frame a millisecond before its tick is meant.
    return np.unique(np.searchsorted(seconds, ticks - 2e-3).clip(max=len(seconds) - 1))


def _even(height: int, width: int, limit: int) -> tuple[int, int]:
    scale = min(1.0, limit / height)
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def _stream(out, height: int, width: int, how: Reencode):  # type: ignore[no-untyped-def]
    options = {
        "preset": "medium",
        "crf": str(how.crf),
        "bf": "0",
        "g": str(how.gop),
        "sc_threshold": "0",
        "threads": "1",
    }
    stream = out.add_stream("libx264", rate=Fraction(how.fps).limit_denominator(1001), options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
    stream.codec_context.colorspace = BT601
    return stream
