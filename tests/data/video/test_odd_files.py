"""Files that are no plain film: several streams, cover art, one picture, nothing to see; clips that change their size."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from keye_data import video
from keye_data.errors import DataError

BACKENDS = ["pyav", "dali", *(["torchcodec"] if importlib.util.find_spec("torchcodec") else [])]


def copied(container: str, *clips: bytes, after: bool = False) -> bytes:
    """The clips as streams of one file, or one after the other in its only stream."""
    out = io.BytesIO()
    sources = [av.open(io.BytesIO(clip)) for clip in clips]
    with av.open(out, "w", format=container) as target:
        streams = [target.add_stream_from_template(s.streams.video[0]) for s in (sources[:1] if after else sources)]
        shift = 0
        for i, source in enumerate(sources):
            packets = [p for p in source.demux(video=0) if p.pts is not None]
            for packet in packets:
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[0 if after else i]
            if after:
                shift = packets[-1].pts + packets[-1].pts - packets[-2].pts
            for packet in packets:
                target.mux(packet)
    for source in sources:
        source.close()
    return out.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("container", ["webm", "mp4"])
def test_of_two_streams_the_first_is_taken_by_all(container, backend, clip, numbers):
    """FFmpeg's own choice would be the larger picture."""
    small, large = (clip("libvpx-vp9", "webm", n, size) for n, size in ((20, (64, 64)), (30, (128, 128))))
    data = copied(container, small, large)
    assert (video.probe(data).n_frames, video.probe(data).width) == (20, 64)
    for wanted in ([19, 0, 7], list(range(20))):
        frames = video.decode(data, wanted, backend, device="cpu")
        assert frames.shape[1:] == (64, 64, 3) and numbers(frames) == wanted
    trimmed, _ = video.trim(data, range(20))
    with av.open(io.BytesIO(trimmed)) as file:
        assert len(file.streams) == 1


def test_two_streams_without_times_are_refused_where_the_choice_is_not_ours(clip, numbers):
    data = copied("avi", clip("libvpx-vp9", "webm", 20), clip("libvpx-vp9", "webm", 20, (128, 128)))
    assert numbers(video.decode(data, [19, 3])) == [19, 3]
    for backend in BACKENDS[1:]:
        with pytest.raises(DataError, match=f"backend {backend} .* vp9 clip"):
            video.decode(data, [19, 3], backend, device="cpu")


def with_cover(container: str, frames: int) -> bytes:
    """A VP9 film of `frames` frames, 64 x 64, behind a cover picture of 256 x 256."""
    with tempfile.NamedTemporaryFile() as out, av.open(out.name, "w", format=container) as file:
        cover: Any = file.add_stream("png")
        cover.width = cover.height = 256
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        film: Any = file.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        film.width = film.height = 64
        film.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 9, np.uint8), format="rgb24")
        file.mux(cover.encode(picture))
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 4 * i, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            file.mux(film.encode(frame))
        file.mux(film.encode() if frames else [])
        file.close()
        return Path(out.name).read_bytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cover_art_is_not_the_film(backend):
    data = with_cover("mp4", 30)
    with av.open(io.BytesIO(data)) as file:
        assert sum(bool(s.disposition & av.stream.Disposition.attached_pic) for s in file.streams.video) == 1
    assert (video.probe(data).n_frames, video.probe(data).width, video.probe(data).codec) == (30, 64, "vp9")
    frames = video.decode(data, [29, 0, 12], backend, device="cpu")
    assert np.abs(frames.mean((1, 2, 3)) - [136, 20, 68]).max() < 2


def test_cover_art_alone_is_no_film(clip):
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        cover: Any = file.add_stream("png")
        cover.width = cover.height = 64
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        sound: Any = file.add_stream("aac", rate=44100, layout="mono")
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in (*sound.encode(frame), *sound.encode()):
            file.mux(packet)
    with pytest.raises(DataError, match="no video stream"):
        video.probe(out.getvalue())


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "webm"])
def test_a_film_without_frames_is_refused(container):
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream("libvpx-vp9" if container == "webm" else "mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.open()
        file.start_encoding()
    for call in (video.probe, video.scan, lambda data: video.decode(data, [0])):
        with pytest.raises(DataError, match=r"^video [0-9]+ bytes: "):
            call(out.getvalue())


def test_a_picture_file_is_no_film():
    for kind in ("JPEG", "PNG"):
        out = io.BytesIO()
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(out, kind)
        with pytest.raises(DataError, match="no video"):
            video.probe(out.getvalue())


def test_an_avi_counts_frames_that_it_leaves_out(clip, numbers):
    """Its header speaks of one frame for every tick; where nothing changed there is none."""
    data = clip("libvpx-vp9", "avi", 3, pts=[0, 40, 400])
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].frames > 3
    assert numbers(video.decode(data, [2, 0, 1])) == [2, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_size_that_changes_is_brought_to_the_one_asked_for(codec, backend, clip, numbers):
    data = copied("webm", clip(codec, "webm", 20, (64, 64)), clip(codec, "webm", 20, (128, 96)), after=True)
    wanted = [19, 20, 39, 3]
    if backend == "dali":  # DALI gives up when the size changes, and says so
        with pytest.raises(DataError, match=r"backend dali .* vp"):
            video.decode(data, wanted, backend, (64, 64), device="cpu")
    else:
        assert numbers(video.decode(data, wanted, backend, (64, 64))) == [19, 0, 19, 3]
