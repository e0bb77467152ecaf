"""Exactly the frames asked for, on every kind of clip and by every backend that can decode it."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest

from keye_data import video

B_FRAMES = {"bf": "3", "b_strategy": "0"}
X265_OPEN = "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0:log-level=none:pools=1:frame-threads=1"
VFR = [0, 40, 50, 200, 240, 700, 1000, 1010, 1020, 1500, 1900, 2500, 2540, 2580, 4000, 4100, 4150, 4200, 7000, 7040]

# name -> (arguments of the clip, codec, timed by its packets)
KINDS: dict[str, tuple[tuple, dict, str, bool]] = {
    "h264": (("libx264", "mp4"), {}, "h264", True),
    "h264 B-frames": (("libx264", "mp4"), {"options": B_FRAMES}, "h264", True),
    "h264 open GOP": (
        ("libx264", "mp4"),
        {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=8:min-keyint=8:b-adapt=0"}, "gop": 8},
        "h264",
        True,
    ),
    "h264 VFR": (("libx264", "mp4", 20), {"pts": VFR, "gop": 7, "options": B_FRAMES}, "h264", True),
    "h264 matroska": (("libx264", "matroska"), {"options": B_FRAMES}, "h264", True),
    "h264 odd size": (("libx264", "mp4", 20, (323, 181)), {"pix_fmt": "yuv444p"}, "h264", True),
    "h264 10 bit": (("libx264", "mp4", 20), {"pix_fmt": "yuv420p10le"}, "h264", True),
    "h264 fragments": (
        ("libx264", "mp4"),
        {"options": B_FRAMES, "mux": {"movflags": "frag_keyframe+empty_moov"}},
        "h264",
        True,
    ),
    "h264 transport stream": (("libx264", "mpegts"), {"options": B_FRAMES}, "h264", False),
    "h264 without container": (("libx264", "h264"), {"options": B_FRAMES}, "h264", False),
    "hevc": (("libx265", "mp4", 30), {}, "hevc", True),
    "hevc open GOP": (
        ("libx265", "mp4"),
        {"options": {"preset": "fast", "x265-params": X265_OPEN}, "gop": 8},
        "hevc",
        True,
    ),
    "mpeg4 B-frames": (("mpeg4", "mp4"), {"options": {"bf": "2"}}, "mpeg4", True),
    "mpeg4 avi": (("mpeg4", "avi"), {"options": {"bf": "2"}}, "mpeg4", False),
    "vp9": (("libvpx-vp9", "webm"), {}, "vp9", True),
    "vp9 VFR": (("libvpx-vp9", "webm", 20), {"pts": VFR, "gop": 7}, "vp9", True),
    "vp9 alternate reference": (
        ("libvpx-vp9", "webm"),
        {"options": {"deadline": "good", "lag-in-frames": "16", "auto-alt-ref": "1"}},
        "vp9",
        True,
    ),
    "vp9 odd size": (("libvpx-vp9", "webm", 20, (323, 181)), {}, "vp9", True),
    "vp9 mp4": (("libvpx-vp9", "mp4", 20), {}, "vp9", True),
    "vp8": (("libvpx", "webm"), {}, "vp8", True),
    "mjpeg": (("mjpeg", "matroska"), {"pix_fmt": "yuvj420p"}, "mjpeg", True),
}
ON_DALI = [name for name, kind in KINDS.items() if kind[2] in ("vp8", "vp9", "mjpeg")]


def asked(n: int) -> list[int]:
    """Sorted, unsorted, repeated, first and last."""
    return [0, n // 3, n - 1, n // 2, n // 2, 1, n - 2, n // 3, 0, 8, 9, 10]


@pytest.mark.parametrize("name", KINDS)
def test_probe(name, clip):
    args, options, codec, timed = KINDS[name]
    info = video.probe(clip(*args, **options))
    n, (width, height) = (*args, *(40, (64, 64))[len(args) - 2 :])[2:4]
    assert (info.n_frames, info.width, info.height, info.codec) == (n, width, height, codec)
    times = np.array(options.get("pts", range(0, 40 * n, 40))) / 1000
    assert info.timestamps.dtype == np.float64
    np.testing.assert_allclose(info.timestamps, times, atol=1e-3 if "webm" in args or "matroska" in args else 1e-9)
    assert video.scan(clip(*args, **options)).exact == timed


def test_the_hard_kinds_are_what_they_are_called(clip):
    def table(name: str) -> video.PacketTable:
        return video.scan(clip(*KINDS[name][0], **KINDS[name][1]))

    def keys(name: str) -> int:
        with av.open(io.BytesIO(clip(*KINDS[name][0], **KINDS[name][1])), "r") as file:
            return sum(p.is_keyframe for p in file.demux(video=0))

    for name in KINDS:
        if "B-frames" in name:
            assert (np.diff(table(name).pts) < 0).any(), name
    assert keys("h264 open GOP") == 5 and table("h264 open GOP").sync.sum() == 1
    assert table("h264").sync.sum() == keys("h264") == 4
    assert clip(*KINDS["h264 fragments"][0], **KINDS["h264 fragments"][1]).count(b"moof") == 4


@pytest.mark.parametrize("name", KINDS)
def test_pyav(name, clip, numbers):
    args, options, _, _ = KINDS[name]
    data = clip(*args, **options)
    n = video.probe(data).n_frames
    assert numbers(video.decode(data, range(n))) == list(range(n))
    assert numbers(video.decode(data, asked(n))) == asked(n)
    for i in (0, n // 2, n - 1):
        assert numbers(video.decode(data, [i])) == [i]


@pytest.mark.parametrize("name", ON_DALI)
def test_dali(name, clip, numbers):
    pytest.importorskip("nvidia.dali")
    args, options, _, _ = KINDS[name]
    data = clip(*args, **options)
    n = video.probe(data).n_frames
    got = video.decode(data, asked(n), "dali", device="cpu")
    assert numbers(got) == asked(n)
    difference = np.abs(got.astype(int) - video.decode(data, asked(n)))
    assert difference.mean() < 2


@pytest.mark.parametrize("name", KINDS)
def test_torchcodec(name, clip, numbers):
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    args, options, _, timed = KINDS[name]
    if not timed:
        pytest.skip("torchcodec needs times in the packets")
    data = clip(*args, **options)
    n = video.probe(data).n_frames
    assert numbers(video.decode(data, asked(n), "torchcodec")) == asked(n)


@pytest.mark.parametrize("name", KINDS)
def test_trim_is_exact(name, clip, numbers):
    args, options, _, timed = KINDS[name]
    data = clip(*args, **options)
    n = video.probe(data).n_frames
    for wanted in ([n - 1], [0], asked(n), [n // 2, n // 2 + 1], list(range(n))):
        small, indices = video.trim(data, wanted)
        assert (video.decode(small, indices) == video.decode(data, wanted)).all(), wanted
    if timed:
        assert len(video.trim(data, [0])[0]) < len(data)


def test_trim_keeps_only_the_groups_that_are_needed(clip):
    data = clip("libx264", "mp4", 200, gop=10)
    small, indices = video.trim(data, [55, 152])
    assert video.probe(small).n_frames == 6 + 3
    assert indices == [5, 8]


def test_seeking_far_apart_gives_the_same_frames(clip, numbers, monkeypatch):
    from keye_data.video import reading

    data = clip("libx264", "mp4", 200, options=B_FRAMES)
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


def remuxed(data: bytes, container: str, change: Callable[[int, Any], bool]) -> bytes:
    """The packets of a clip for which `change(number, packet)` is true, copied."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data), "r") as source, av.open(out, "w", format=container) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(p for p in source.demux(video=0) if p.pts is not None):
            if change(i, packet):
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def test_a_hidden_vp8_frame_has_no_index(clip, numbers):
    """VP8 carries frames that are decoded and never shown: here the sixth, by its header's show bit."""

    def hide(number: int, packet: Any) -> bool:
        if number == 5:
            data = bytes(packet)
            packet.update(bytes([data[0] & ~16]) + data[1:])
        return True

    data = remuxed(clip("libvpx", "webm"), "webm", hide)
    left = [i for i in range(40) if i != 5]
    assert video.probe(data).n_frames == 39
    for backend in ("pyav", "dali"):
        assert numbers(video.decode(data, range(39), backend, device="cpu")) == left
    small, indices = video.trim(data, [7, 30])
    assert numbers(video.decode(small, indices)) == [8, 31]


@pytest.mark.parametrize("kind", ["h264 open GOP", "hevc open GOP"])
def test_a_clip_that_begins_in_an_open_group_has_only_the_frames_that_can_be_seen(kind, clip, numbers):
    """Cut before its second key frame: the frames shown before that one lack their references and do not exist."""
    args, options, _, _ = KINDS[kind]
    seen: list[bool] = []

    def after_first_group(number: int, packet: Any) -> bool:
        seen.append(packet.is_keyframe)
        return sum(seen) > 1

    data = remuxed(clip(*args, **options), "mp4", after_first_group)
    assert not video.scan(data).exact
    n = video.probe(data).n_frames
    assert n == 32
    assert numbers(video.decode(data, [0, n - 1, 7])) == [8, 39, 15]
    small, indices = video.trim(data, [7])
    assert numbers(video.decode(small, indices)) == [15]


def test_path_and_bytes_agree(clip, tmp_path):
    data = clip("libx264", "mp4")
    path = tmp_path / "a:b 100%.mp4"
    path.write_bytes(data)
    for source in (path, str(path)):
        assert (video.decode(source, [3, 1]) == video.decode(data, [3, 1])).all()
    assert (video.probe(path).timestamps == video.probe(bytearray(data)).timestamps).all()
