"""Whatever is wrong is said once, clearly, and never as a frame that was not asked for."""

from __future__ import annotations

import numpy as np
import pytest

from keye_data import video
from keye_data.errors import DataError

WAYS = {
    "probe": video.probe,
    "scan": video.scan,
    "decode": lambda src: video.decode(src, [0]),
    "trim": lambda src: video.trim(src, [0]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "src",
    [
        b"",
        b"\0" * 5000,
        b"not a video, only some text\n" * 50,
        bytes(range(256)) * 20,
        b"#EXTM3U\nhttp://nowhere/a.ts\n",
    ],
    ids=["empty", "zeros", "text", "garbage", "play list"],
)
def test_garbage(way, src):
    with pytest.raises(DataError, match=r"^video [0-9]+ bytes: "):
        WAYS[way](src)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("mjpeg", "matroska"), ("mpeg4", "avi")])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(way, kind, part, clip):
    options = {"pix_fmt": "yuvj420p"} if kind[0] == "mjpeg" else {}
    data = clip(*kind, 40, (128, 96), **options)
    with pytest.raises(DataError):
        WAYS[way](data[: int(len(data) * part)])


def test_truncated_with_the_index_first(clip):
    data = clip("libx264", "mp4", 40, (128, 96), mux={"movflags": "faststart"})
    assert data.index(b"moov") < data.index(b"mdat")
    with pytest.raises(DataError, match="cut short"):
        video.decode(data[: len(data) * 2 // 3], [0])


def test_truncated_fragments(clip):
    data = clip("libx264", "mp4", 40, (128, 96), mux={"movflags": "frag_keyframe+empty_moov"})
    with pytest.raises(DataError, match="cut short"):
        video.decode(data[: len(data) // 2], [0])


def test_broken_payload_is_an_error_or_a_frame_but_never_a_crash(clip):
    good = clip("libvpx-vp9", "webm", 40, (128, 96))
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(20):
        data = np.frombuffer(good, np.uint8).copy()
        at = rng.integers(600, len(data) - 200)
        data[at : at + 60] = rng.integers(0, 256, 60)
        try:
            assert video.decode(data.tobytes(), range(40)).shape == (40, 96, 128, 3)
        except (DataError, IndexError) as error:
            failed += 1
            assert "video" in str(error)
    assert failed > 0


@pytest.mark.parametrize("index", [40, -1, 10**9])
@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_out_of_range(index, backend, clip):
    data = clip("libvpx-vp9", "webm")
    with pytest.raises(IndexError, match=f"{index} asked for, it has 0..39"):
        video.decode(data, [0, index], backend)
    with pytest.raises(IndexError, match=f"{index} asked for"):
        video.trim(data, [0, index])


def test_reasons_under_which_skipped_samples_are_counted(clip, tmp_path):
    cases = {
        "damaged video": lambda: video.probe(clip()[:2000]),
        "unsupported codec": lambda: video.decode(clip(), [0], "dali", device="cpu"),
        "missing media": lambda: video.probe(tmp_path / "nowhere.mp4"),
        "too large": lambda: video.decode(clip(), [0], size=(20_000, 28)),
    }
    for reason, call in cases.items():
        with pytest.raises(DataError) as error:
            call()
        assert error.value.reason == reason


def test_no_indices(clip):
    assert video.decode(clip(), []).shape == (0, 64, 64, 3)
    assert video.decode(clip(), [], size=(28, 56)).shape == (0, 28, 56, 3)


def test_a_codec_the_backend_cannot_do(clip):
    with pytest.raises(ValueError, match=r"dali on cpu cannot decode h264"):
        video.decode(clip("libx264", "mp4"), [0], "dali", device="cpu")
    unknown = clip("libx264", "mp4").replace(b"avc1", b"zzzz")
    with pytest.raises(video.UnsupportedCodec, match="backend pyav"):
        video.decode(unknown, [0])


def test_unknown_names(clip):
    with pytest.raises(ValueError, match="'opencv' is none of pyav, dali, torchcodec"):
        video.decode(clip(), [0], "opencv")
    with pytest.raises(ValueError, match="'tpu' is none of"):
        video.decode(clip(), [0], "dali", device="tpu")


def test_torchcodec_missing_says_what_to_install(clip, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(RuntimeError, match="install torchcodec"):
        video.decode(clip(), [0], "torchcodec")


def test_paths(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.mp4"):
        video.probe(tmp_path / "nowhere.mp4")
    with pytest.raises(DataError):
        video.probe(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        video.probe("http://127.0.0.1:9/a.mp4")


def test_no_picture_stream(tmp_path):
    import io

    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for packet in (*stream.encode(frame), *stream.encode()):
            file.mux(packet)
    with pytest.raises(DataError, match="no video stream"):
        video.probe(out.getvalue())


def test_too_large(clip, monkeypatch):
    from keye_data.video import container

    monkeypatch.setattr(container, "MAX_SIDE", 63)
    with pytest.raises(DataError, match="64 x 64 is larger than the bounds"):
        video.probe(clip())
    monkeypatch.undo()
    with pytest.raises(DataError, match="larger than the bounds"):
        video.decode(clip(), [0], size=(20_000, 28))
    monkeypatch.setattr(container, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than the bound"):
        video.probe(clip())


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_what_an_edit_list_hides_does_not_exist(codec, clip, with_late_start, numbers):
    options = {"bf": "2", "b_strategy": "0"} if codec == "libx264" else {}
    data = clip(codec, "mp4", mux={"video_track_timescale": "25000"}, options=options)
    late = with_late_start(data, 5 * 1000)
    table = video.scan(late)
    assert table.discard.sum() == 5
    info = video.probe(late)
    assert info.n_frames == 35 and info.timestamps[0] == 0
    assert numbers(video.decode(late, [0, 34, 2, 20])) == [5, 39, 7, 25]
    small, indices = video.trim(late, [2, 20])
    assert numbers(video.decode(small, indices)) == [7, 25]
    if codec == "libvpx-vp9":
        assert numbers(video.decode(late, [0, 34, 2], "dali", device="cpu")) == [5, 39, 7]
