"""The clips that are measured: the real film, cut, transcoded and looped; or small generated ones.

Real: Big Buck Bunny, H.264, 720p, 24 fps, ten minutes, fetched as tools/fetch_samples.py does. Everything made of it is kept in
a folder and not made again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye_data.video import scan, trim

ROOT = Path(__file__).resolve().parents[2]
KEY_EVERY = 128  # frames, in the VP9 clips
VP9 = {"deadline": "realtime", "cpu-used": "8", "row-mt": "0", "b": "800k", "lag-in-frames": "0"}


@dataclass
class Clips:
    """Files of one picture size, in H.264 and VP9."""

    h264: Path  # the excerpt that decoders are compared on
    vp9: Path  # the same frames
    h264_hour: Path
    vp9_hour: Path


def real(cache: Path, seconds: int, hour: float) -> Clips:
    """`seconds` of the film from its second minute on, and `hour` seconds of it looped by stream copy."""
    cache.mkdir(parents=True, exist_ok=True)
    film = _film(cache)
    table = scan(film)
    rate = (len(table.frames) - 1) / (float(np.ptp(table.pts[table.frames])) * float(table.time_base))
    first = round(120 * rate)

    def cut(path: Path) -> None:
        path.write_bytes(trim(film, range(first, first + round(seconds * rate)), table)[0])

    h264 = _kept(cache / f"film_{seconds}s.mp4", cut)
    vp9 = _kept(cache / f"film_{seconds}s.webm", lambda path: transcode(h264, path))
    return Clips(
        h264,
        vp9,
        _kept(cache / f"film_looped_{hour:g}s.mp4", lambda path: loop(film, path, hour)),
        _kept(cache / f"film_looped_{hour:g}s.webm", lambda path: loop(vp9, path, hour)),
    )


def generated(cache: Path, frames: int = 240, hour: float = 60.0, size: tuple[int, int] = (320, 180)) -> Clips:
    """The same four files of a moving pattern, 24 frames a second; `size` is (width, height)."""
    cache.mkdir(parents=True, exist_ok=True)
    h264 = _kept(cache / "made.mp4", lambda path: _draw(path, frames, size))
    vp9 = _kept(cache / "made.webm", lambda path: transcode(h264, path, key_every=48))
    return Clips(
        h264,
        vp9,
        _kept(cache / "made_looped.mp4", lambda path: loop(h264, path, hour)),
        _kept(cache / "made_looped.webm", lambda path: loop(vp9, path, hour)),
    )


def transcode(source: Path, target: Path, key_every: int = KEY_EVERY) -> None:
    """VP9 in WebM with a key frame every `key_every` frames or fewer."""
    with av.open(str(source)) as film, av.open(str(target), "w", format="webm") as out:
        picture = film.streams.video[0]
        stream: Any = out.add_stream("libvpx-vp9", rate=picture.average_rate, options={**VP9, "g": str(key_every)})
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        stream.codec_context.colorspace = picture.codec_context.colorspace
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame in film.decode(picture):
            frame.pict_type = av.video.frame.PictureType.NONE  # the film's own key frames are not this clip's
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def loop(source: Path, target: Path, seconds: float) -> None:
    """The packets of `source` again and again until `seconds` are full, the last round up to a key frame; nothing is re-encoded."""
    with av.open(str(source)) as film, av.open(str(target), "w", format=target.suffix[1:]) as out:
        picture = film.streams.video[0]
        base = picture.time_base or Fraction(1, 1000)
        packets = [p for p in film.demux(picture) if p.size and p.pts is not None and p.dts is not None]
        copy = out.add_stream_from_template(picture)
        times = sorted(p.pts or 0 for p in packets)
        length = times[-1] - times[0] + (times[-1] - times[0]) // (len(times) - 1)
        places = [(p.pts or 0, p.dts or 0) for p in packets]
        shift = 0
        while True:
            for packet, (pts, dts) in zip(packets, places):
                if packet.is_keyframe and (shift + pts - times[0]) * base >= seconds:
                    return
                again = av.Packet(bytes(packet))
                again.pts, again.dts, again.time_base = pts + shift, dts + shift, base
                again.duration, again.is_keyframe, again.stream = packet.duration, packet.is_keyframe, copy
                out.mux(again)
            shift += length


def tokenizer(cache: Path) -> Path:
    """The Qwen vocabulary of the demo, or fetched."""
    return _fetched("dashscope", "../qwen.tiktoken", cache)


def _film(cache: Path) -> Path:
    return _fetched("moviepy", "bunny.mp4", cache)


def _fetched(package: str, name: str, cache: Path) -> Path:
    """originals/name of tools/fetch_samples.py: the demo's where it is there, that one package's otherwise."""
    known = ROOT / "demo" / "samples" / "originals" / name
    if known.is_file():
        return known.resolve()
    sys.path.insert(0, str(ROOT / "tools"))
    from fetch_samples import PACKAGES, fetch  # type: ignore[import-not-found]

    originals = cache / "samples" / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    fetch(next(one for one in PACKAGES if one.name == package), originals)
    return (originals / name).resolve()


def _kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there: whole or not at all."""
    if not path.exists():
        part = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            make(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _draw(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Discs that move over a gradient: no two frames are alike."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"preset": "veryfast", "bf": "2", "g": "48"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(frames):
            pixels = ground.copy()
            for k, speed in enumerate((3, 5, 7)):
                at_x, at_y = (17 * k + speed * i) % width, (29 * k + speed * i // 2) % height
                pixels[(x - at_x) ** 2 + (y - at_y) ** 2 < (height // 8) ** 2] = (255 - 80 * k, 60 * k, 200)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
