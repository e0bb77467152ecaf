"""Exactly the frames asked for, or a refusal: every kind of clip (CLIPS) on every backend (BACKENDS).

Each frame carries its number, so a frame that is off by one cannot pass. torchcodec is among the backends where it is installed;
test_torchcodec.py runs this file with it in a process of its own.
"""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pytest

from keye_data import video
from keye_data.errors import DataError


@dataclass
class Backend:
    codecs: frozenset[str] | None  # what it decodes on a CPU; None: everything
    tolerance: int  # greatest difference of a grey pixel from PyAV's; colours are in test_pixels.py
    needs_times: bool  # refuses clips whose packets carry no reliable times


BACKENDS = {
    "pyav": Backend(None, 0, False),
    "dali": Backend(frozenset({"vp8", "vp9", "mjpeg"}), 2, False),  # its CPU side; bilinear chroma, its own rounding
    "torchcodec": Backend(None, 1, True),
}
if importlib.util.find_spec("torchcodec") is None:
    del BACKENDS["torchcodec"]


@dataclass
class Kind:
    """`clip(*args, **options)`, then `change`d; the numbers `seen` are in the frames that exist, in their order."""

    codec: str
    args: tuple  # encoder, container, frames (40), (width, height) (64, 64)
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None
    seen: Sequence[int] | None = None
    timed: bool = True  # packets say reliably when their frames are shown
    quarters: int = 0  # clockwise turns of the display
    refused_by: tuple[str, ...] = ()  # besides the codecs and times that BACKENDS tells

    @property
    def frames(self) -> Sequence[int]:
        return self.seen or range(self.args[2] if len(self.args) > 2 else 40)

    @property
    def times(self) -> np.ndarray:
        """Seconds from the first frame."""
        ms = np.array(self.options.get("pts") or range(0, 4000, 40))[list(self.frames)]
        return (ms - ms[0]) / 1000

    @property
    def shape(self) -> tuple[int, int]:
        """Displayed height and width."""
        width, height = self.args[3] if len(self.args) > 3 else (64, 64)
        return (width, height) if self.quarters % 2 else (height, width)


def edited(*edits: tuple[int, int | None]) -> Callable[[bytes], bytes]:
    """An MP4 with another edit list: (frames shown, first frame, None for a pause) each, of frames 40 ms long."""

    def change(mp4: bytes) -> bytes:
        at = mp4.index(b"elst") - 4
        (size,), (begin,) = struct.unpack(">I", mp4[at : at + 4]), struct.unpack(">i", mp4[at + 20 : at + 24])
        tick = 1000  # of the media, where the clip is made with TICKS; durations count milliseconds
        rows = [(40 * n, -1 if first is None else begin + tick * first, 1 << 16) for n, first in edits]
        body = struct.pack(">4sII", b"elst", 0, len(rows)) + b"".join(struct.pack(">IiI", *row) for row in rows)
        out = bytearray(mp4[:at] + struct.pack(">I", len(body) + 4) + body + mp4[at + size :])
        moov = mp4.index(b"moov")
        assert moov > mp4.index(b"mdat")  # so that nothing moves that chunk offsets point to
        for box in (b"moov", b"trak", b"edts"):
            place = out.index(box, moov) - 4
            struct.pack_into(">I", out, place, struct.unpack_from(">I", out, place)[0] + len(body) + 4 - size)
        return bytes(out)

    return change


def turned(*matrix: int) -> Callable[[bytes], bytes]:
    """An MP4 with another display matrix (a, b, c, d)."""

    def change(mp4: bytes) -> bytes:
        at, (a, b, c, d) = mp4.index(b"tkhd") + 44, (x << 16 for x in matrix)
        return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[at + 36 :]

    return change


def remuxed(container: str, change: Callable[[int, Any], bool]) -> Callable[[bytes], bytes]:
    """The packets of a clip for which `change(number, packet)` is true, copied."""

    def copy(data: bytes) -> bytes:
        out = io.BytesIO()
        with av.open(io.BytesIO(data), "r") as source, av.open(out, "w", format=container) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for i, packet in enumerate(p for p in source.demux(video=0) if p.pts is not None):
                if change(i, packet):
                    packet.stream = stream
                    target.mux(packet)
        return out.getvalue()

    return copy


def hide_sixth(number: int, packet: Any) -> bool:
    """Takes the show bit of VP8 from the sixth frame."""
    if number == 5:
        data = bytes(packet)
        packet.update(bytes([data[0] & ~16]) + data[1:])
    return True


def after_first_group() -> Callable[[int, Any], bool]:
    keys: list[int] = []

    def keep(number: int, packet: Any) -> bool:
        keys.extend([number] if packet.is_keyframe else [])
        return len(keys) > 1

    return keep


def broken_links(number: int, packet: Any) -> bool:
    """Every clean random access of HEVC (21) becomes a broken link (16): what leads up to it can no longer be seen."""
    data, at = bytearray(bytes(packet)), 0
    while at + 4 < len(data):
        if data[at + 4] >> 1 & 63 == 21:
            data[at + 4] = data[at + 4] & 129 | 16 << 1
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    packet.update(bytes(data))
    return True


B = {"bf": "3", "b_strategy": "0"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
TICKS = {"video_track_timescale": "25000"}
FULL = {"pix_fmt": "yuvj420p"}
ALT = {"deadline": "good", "lag-in-frames": "16", "auto-alt-ref": "1"}
OPEN_264 = {"gop": 8, "options": {"bf": "3", "x264-params": "open-gop=1:keyint=8:min-keyint=8:b-adapt=0"}}
X265 = "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0:log-level=none:pools=1:frame-threads=1"
OPEN_265 = {"gop": 8, "options": {"preset": "fast", "x265-params": X265}}
VFR = [0, 40, 50, 200, 240, 700, 1000, 1010, 1020, 1500, 1900, 2500, 2540, 2580, 4000, 4100, 4150, 4200, 7000, 7040]
LATE = [t - 77 for t in range(0, 1600, 40)]  # the first two frames before 0: an MP4's edit list then hides them
MID, TWICE = [*range(7, 27)], [*range(3, 13), *range(25, 35)]
LED = [i for i in range(40) if i % 8 < 5 or i > 32]  # without the three frames shown before each key frame

CLIPS: dict[str, Kind] = {
    # H.264
    "h264 mp4": Kind("h264", ("libx264", "mp4")),
    "h264 mp4 B-frames": Kind("h264", ("libx264", "mp4"), {"options": B}),
    "h264 mp4 open GOP": Kind("h264", ("libx264", "mp4"), OPEN_264),
    "h264 mp4 variable rate": Kind("h264", ("libx264", "mp4", 20), {"pts": VFR, "gop": 7, "options": B}),
    "h264 mp4 odd size": Kind("h264", ("libx264", "mp4", 20, (323, 181)), {"pix_fmt": "yuv444p"}),
    "h264 mp4 10 bit": Kind("h264", ("libx264", "mp4", 20), {"pix_fmt": "yuv420p10le"}),
    "h264 mp4 fragments": Kind("h264", ("libx264", "mp4"), {"options": B, "mux": FRAGMENTS}),
    "h264 mp4 rotated": Kind("h264", ("libx264", "mp4", 20), {}, turned(0, 1, -1, 0), quarters=1),
    "h264 mp4 one frame": Kind("h264", ("libx264", "mp4", 1)),
    "h264 mp4 begins before 0": Kind("h264", ("libx264", "mp4"), {"pts": LATE, "options": B}, seen=range(2, 40)),
    "h264 mov": Kind("h264", ("libx264", "mov"), {"options": B}),
    "h264 mkv": Kind("h264", ("libx264", "matroska"), {"options": B}),
    "h264 avi": Kind("h264", ("libx264", "avi"), {"options": B}, timed=False),
    "h264 ts": Kind("h264", ("libx264", "mpegts"), {"options": B}, timed=False),
    "h264 ts begins before 0": Kind(
        "h264",
        ("libx264", "mpegts"),
        {"pts": LATE, "options": B, "mux": {"avoid_negative_ts": "disabled"}},
        timed=False,
    ),
    "h264 ts open GOP": Kind("h264", ("libx264", "mpegts"), OPEN_264, timed=False),
    "h264 without container": Kind("h264", ("libx264", "h264"), {"options": B}, timed=False),
    "h264 begins in an open GOP": Kind(
        "h264", ("libx264", "mp4"), OPEN_264, remuxed("mp4", after_first_group()), range(8, 40), timed=False
    ),
    # edit lists
    "h264 cut at the start": Kind("h264", ("libx264", "mp4"), {"mux": TICKS}, edited((35, 5)), range(5, 40)),
    "h264 cut at the end": Kind("h264", ("libx264", "mp4"), {"mux": TICKS}, edited((20, 0)), range(20)),
    "h264 cut at both": Kind("h264", ("libx264", "mp4"), {"mux": TICKS, "options": B}, edited((20, 7)), MID),
    "h264 after a pause": Kind("h264", ("libx264", "mp4"), {"mux": TICKS, "options": B}, edited((9, None), (40, 0))),
    "h264 two cuts": Kind("h264", ("libx264", "mp4"), {"mux": TICKS}, edited((10, 3), (10, 25)), TWICE, timed=False),
    "h264 two cuts B-frames": Kind(
        "h264", ("libx264", "mp4"), {"mux": TICKS, "options": B}, edited((10, 3), (10, 25)), TWICE, timed=False
    ),
    "h264 a part twice": Kind(
        "h264", ("libx264", "mp4"), {"mux": TICKS}, edited((10, 3), (10, 3)), [*range(3, 13)] * 2, timed=False
    ),
    "vp9 cut at the start": Kind("vp9", ("libvpx-vp9", "mp4"), {"mux": TICKS}, edited((35, 5)), range(5, 40)),
    "vp9 cut at the end": Kind("vp9", ("libvpx-vp9", "mp4"), {"mux": TICKS}, edited((20, 0)), range(20)),
    "vp9 cut at both": Kind("vp9", ("libvpx-vp9", "mp4"), {"mux": TICKS}, edited((20, 7)), MID),
    "vp9 two cuts": Kind(
        "vp9", ("libvpx-vp9", "mp4"), {"mux": TICKS}, edited((10, 3), (10, 25)), TWICE, False, refused_by=("dali",)
    ),
    # HEVC
    "hevc mp4": Kind("hevc", ("libx265", "mp4", 30)),
    "hevc mp4 variable rate": Kind("hevc", ("libx265", "mp4", 20), {"pts": VFR, "gop": 7}),
    "hevc mp4 open GOP": Kind("hevc", ("libx265", "mp4"), OPEN_265),
    "hevc mp4 odd size": Kind("hevc", ("libx265", "mp4", 10, (323, 181)), {"pix_fmt": "yuv444p"}),
    "hevc mp4 10 bit": Kind("hevc", ("libx265", "mp4", 20), {"pix_fmt": "yuv420p10le"}),
    "hevc mp4 fragments": Kind("hevc", ("libx265", "mp4", 20), {"mux": FRAGMENTS}),
    "hevc mov rotated": Kind("hevc", ("libx265", "mov", 20), {}, turned(-1, 0, 0, -1), quarters=2),
    "hevc mkv": Kind("hevc", ("libx265", "matroska", 20)),
    "hevc ts": Kind("hevc", ("libx265", "mpegts", 20), timed=False),
    "hevc without container": Kind("hevc", ("libx265", "hevc", 20), timed=False),
    "hevc begins in an open GOP": Kind(
        "hevc", ("libx265", "mp4"), OPEN_265, remuxed("mp4", after_first_group()), range(8, 40), timed=False
    ),
    "hevc broken links": Kind(
        "hevc", ("libx265", "mp4"), OPEN_265, remuxed("mp4", broken_links), LED, refused_by=("torchcodec",)
    ),
    # VP8 and VP9
    "vp8 webm": Kind("vp8", ("libvpx", "webm")),
    "vp8 webm variable rate": Kind("vp8", ("libvpx", "webm", 20), {"pts": VFR, "gop": 7}),
    "vp8 webm odd size": Kind("vp8", ("libvpx", "webm", 20, (323, 181))),
    "vp8 webm alternate reference": Kind("vp8", ("libvpx", "webm"), {"options": ALT}),
    "vp8 webm a hidden frame": Kind(
        "vp8",
        ("libvpx", "webm"),
        {},
        remuxed("webm", hide_sixth),
        [i for i in range(40) if i != 5],
        refused_by=("torchcodec",),
    ),
    "vp8 mkv": Kind("vp8", ("libvpx", "matroska", 20)),
    "vp8 avi": Kind("vp8", ("libvpx", "avi", 20), timed=False),
    "vp9 webm": Kind("vp9", ("libvpx-vp9", "webm")),
    "vp9 webm variable rate": Kind("vp9", ("libvpx-vp9", "webm", 20), {"pts": VFR, "gop": 7}),
    "vp9 webm odd size": Kind("vp9", ("libvpx-vp9", "webm", 20, (323, 181))),
    "vp9 webm alternate reference": Kind("vp9", ("libvpx-vp9", "webm"), {"options": ALT}),
    "vp9 mkv": Kind("vp9", ("libvpx-vp9", "matroska", 20)),
    "vp9 mp4": Kind("vp9", ("libvpx-vp9", "mp4", 20)),
    "vp9 mp4 fragments": Kind("vp9", ("libvpx-vp9", "mp4", 20), {"mux": FRAGMENTS}),
    "vp9 mp4 rotated": Kind("vp9", ("libvpx-vp9", "mp4", 20), {}, turned(0, -1, 1, 0), quarters=3),
    "vp9 mp4 begins before 0": Kind("vp9", ("libvpx-vp9", "mp4"), {"pts": LATE}, seen=range(2, 40)),
    "vp9 avi": Kind("vp9", ("libvpx-vp9", "avi", 20), timed=False),
    # MJPEG, MPEG-4, AV1
    "mjpeg mkv": Kind("mjpeg", ("mjpeg", "matroska"), FULL),
    "mjpeg mkv variable rate": Kind("mjpeg", ("mjpeg", "matroska", 20), {"pts": VFR, **FULL}),
    "mjpeg mov odd size": Kind("mjpeg", ("mjpeg", "mov", 20, (323, 181)), FULL),
    "mjpeg mp4": Kind("mjpeg", ("mjpeg", "mp4", 20), FULL),
    "mjpeg avi": Kind("mjpeg", ("mjpeg", "avi", 20), FULL, timed=False),
    "mjpeg without container": Kind("mjpeg", ("mjpeg", "mjpeg", 20), FULL, timed=False),
    "mpeg4 mp4 B-frames": Kind("mpeg4", ("mpeg4", "mp4"), {"options": {"bf": "2"}}),
    "mpeg4 avi": Kind("mpeg4", ("mpeg4", "avi"), {"options": {"bf": "2"}}, timed=False),
    "av1 mp4": Kind("av1", ("libsvtav1", "mp4", 20), {"options": {"preset": "11"}}),
}


@pytest.fixture(scope="module")
def film(clip):
    """film(name) -> the bytes of a kind of clip, made once."""
    made: dict[str, bytes] = {}

    def get(name: str) -> bytes:
        if name not in made:
            kind = CLIPS[name]
            data = clip(*kind.args, **kind.options)
            made[name] = kind.change(data) if kind.change else data
        return made[name]

    return get


@pytest.fixture(scope="module")
def read(numbers):
    """read(frames, kind) -> the numbers in displayed frames."""
    return lambda frames, kind: numbers(np.rot90(frames, kind.quarters, axes=(1, 2)))


def asked(n: int) -> list[int]:
    """Unsorted, repeated, first and last."""
    return [i % n for i in (0, n // 3, n - 1, n // 2, n // 2, 1, n - 2, n // 3, 0, 8, 9, 10)]


@pytest.mark.parametrize("name", CLIPS)
def test_probe(name, film):
    kind, info = CLIPS[name], video.probe(film(name))
    assert (info.n_frames, info.height, info.width, info.codec) == (len(kind.frames), *kind.shape, kind.codec)
    assert info.timestamps.dtype == np.float64
    if kind.seen is None or kind.timed:  # else an edit list or a cut decides them
        whole_ms = "webm" in kind.args or "matroska" in kind.args or "pts" in kind.options
        np.testing.assert_allclose(info.timestamps, kind.times, atol=1e-3 if whole_ms else 1e-9)
    assert video.scan(film(name)).exact == kind.timed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLIPS)
def test_exactly_the_frames_asked_for_or_a_refusal(name, backend, film, read):
    kind, how, data = CLIPS[name], BACKENDS[backend], film(name)
    n = len(kind.frames)
    wanted = asked(n)
    unable = how.codecs is not None and kind.codec not in how.codecs
    if unable or backend in kind.refused_by or (how.needs_times and not kind.timed):
        with pytest.raises(DataError, match=f"backend {backend} .*{kind.codec}") as error:
            video.decode(data, wanted, backend, device="cpu")
        assert isinstance(error.value, video.UnsupportedCodec) == unable
        return
    frames = video.decode(data, wanted, backend, device="cpu")
    assert read(frames, kind) == [kind.frames[i] for i in wanted]
    for i in (0, n // 2, n - 1):
        assert read(video.decode(data, [i], backend, device="cpu"), kind) == [kind.frames[i]]
    pyav = video.decode(data, range(n))
    assert read(pyav, kind) == list(kind.frames)
    assert np.abs(frames.astype(int) - pyav[wanted]).max() <= how.tolerance


@pytest.mark.parametrize("name", CLIPS)
def test_trim_is_exact(name, film):
    data, n = film(name), len(CLIPS[name].frames)
    for wanted in ([n - 1], [0], asked(n), list(range(n // 2, min(n, n // 2 + 2))), list(range(n))):
        small, indices = video.trim(data, wanted)
        assert (video.decode(small, indices) == video.decode(data, wanted)).all(), wanted
    if CLIPS[name].timed and n > 1:
        assert len(video.trim(data, [0])[0]) < len(data)


def test_the_hard_kinds_are_what_they_are_called(film):
    def keys(name: str) -> int:
        with av.open(io.BytesIO(film(name)), "r") as file:
            return sum(p.is_keyframe for p in file.demux(video=0))

    for name in CLIPS:
        if "B-frames" in name and CLIPS[name].timed:
            assert (np.diff(video.scan(film(name)).pts) < 0).any(), name
    assert keys("h264 mp4 open GOP") == 5 and video.scan(film("h264 mp4 open GOP")).sync.sum() == 1
    assert video.scan(film("h264 mp4")).sync.sum() == keys("h264 mp4") == 4
    assert film("h264 mp4 fragments").count(b"moof") == 4
    assert video.scan(film("h264 cut at both")).discard.any()
    assert video.scan(film("hevc broken links")).hidden.sum() == 12
    assert video.scan(film("h264 ts begins before 0")).pts[0] < 0


def test_trim_keeps_only_the_groups_that_are_needed(clip):
    data = clip("libx264", "mp4", 200, gop=10)
    small, indices = video.trim(data, [55, 152])
    assert video.probe(small).n_frames == 6 + 3
    assert indices == [5, 8]


def test_seeking_far_apart_gives_the_same_frames(clip, numbers, monkeypatch):
    from keye_data.video import reading

    data = clip("libx264", "mp4", 200, options=B)
    seeks: list[int] = []
    original = reading._seek

    def counted(*args: Any) -> Any:
        seeks.append(args[-1])
        return original(*args)

    monkeypatch.setattr(reading, "_seek", counted)
    monkeypatch.setattr(reading, "SEEK_GAP", 0)
    wanted = [199, 101, 3, 77]
    assert numbers(video.decode(data, wanted)) == wanted
    assert len(seeks) == 3


def test_path_and_bytes_agree(clip, tmp_path):
    data = clip("libx264", "mp4")
    path = tmp_path / "a:b 100%.mp4"
    path.write_bytes(data)
    for source in (path, str(path)):
        assert (video.decode(source, [3, 1]) == video.decode(data, [3, 1])).all()
    assert (video.probe(path).timestamps == video.probe(bytearray(data)).timestamps).all()
