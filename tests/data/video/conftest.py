"""Clips whose every frame carries its number: a 4 x 4 grid of light and dark blocks, 16 bits."""

from __future__ import annotations

import os

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder's own log: errors only

import struct
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

Clip = Callable[..., bytes]

SPEED = {
    "libx264": {"preset": "ultrafast", "bf": "0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] with the number burnt in."""
    bits = (number >> np.arange(16) & 1).reshape(4, 4)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat((40 + 175 * bits[rows][:, columns]).astype(np.uint8)[..., None], 3, axis=2)


def make_clip(
    codec: str = "libx264",
    container: str = "mp4",
    frames: int = 40,
    size: tuple[int, int] = (64, 64),
    *,
    gop: int = 10,
    pts: Sequence[int] | None = None,
    pixels: np.ndarray | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    colorspace: int | None = None,
    color_range: int | None = None,
    mux: dict[str, str] | None = None,
) -> bytes:
    """A clip of `size` (width, height); pts in milliseconds (40 apart if None); `pixels` [H, W, 3] in place of numbers."""
    with tempfile.NamedTemporaryFile() as out, av.open(out.name, "w", format=container, options=mux or {}) as file:
        stream: Any = file.add_stream(codec, rate=25, options=SPEED.get(codec, {}) | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size) if pixels is None else pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace or None, dst_color_range=color_range)
            if color_range is not None:
                frame.color_range = color_range
            frame.pts = i if pts is None else pts[i]
            frame.time_base = Fraction(1, 25) if pts is None else Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        file.close()
        return Path(out.name).read_bytes()


def read_numbers(frames: np.ndarray) -> list[int]:
    """uint8 [F, H, W, 3] -> the number in each frame."""
    f, h, w, _ = frames.shape
    ys, xs = [(2 * i + 1) * h // 8 for i in range(4)], [(2 * i + 1) * w // 8 for i in range(4)]
    bits = frames[:, ys][:, :, xs].mean(-1) > 127
    return (bits.reshape(f, 16) << np.arange(16)).sum(1).tolist()


def set_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same MP4 with another display matrix in its track header."""
    at = mp4.index(b"tkhd") + 4 + 40
    one = 1 << 16
    return mp4[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + mp4[at + 36 :]


def skip_start(mp4: bytes, ticks: int) -> bytes:
    """The same MP4 with an edit list that begins `ticks` later."""
    at = mp4.index(b"elst") + 8
    count, duration, start, rate = struct.unpack(">IIiI", mp4[at : at + 16])
    assert count == 1 and start >= 0
    return mp4[:at] + struct.pack(">IIiI", 1, duration, start + ticks, rate) + mp4[at + 16 :]


@pytest.fixture(scope="session")
def clip() -> Clip:
    """`make_clip`, every clip made once."""
    made: dict[str, bytes] = {}

    def get(*args: object, **kwargs: object) -> bytes:
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = make_clip(*args, **kwargs)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def numbers() -> Callable[[np.ndarray], list[int]]:
    return read_numbers


@pytest.fixture(scope="session")
def with_matrix() -> Callable[..., bytes]:
    return set_matrix


@pytest.fixture(scope="session")
def with_late_start() -> Callable[[bytes, int], bytes]:
    return skip_start
