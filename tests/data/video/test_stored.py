"""Clips as they lie in shards: every frame of every segment is the one that the uncut clip gives."""

from __future__ import annotations

import dataclasses
import io
import logging

import numpy as np
import pytest

from keye_data import video
from keye_data.errors import DataError
from keye_data.stretch import Stretch

B_FRAMES = {"bf": "3", "b_strategy": "0"}
X265_CLOSED = "open-gop=0:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0:log-level=none:pools=1:frame-threads=1"
VFR = np.cumsum([0] + [10, 150, 40, 200, 90, 310, 10] * 9).tolist()[:60]
OPEN = {"bf": "3", "x264-params": "open-gop=1:keyint=8:min-keyint=24:b-adapt=0"}
# name -> arguments of the clip, whether it can be cut
KINDS: dict[str, tuple[tuple, dict, bool]] = {
    "h264": (("libx264", "mp4", 60), {}, True),
    "h264 B-frames": (("libx264", "mp4", 60), {"options": B_FRAMES}, True),
    "h264 VFR": (("libx264", "mp4", 60), {"pts": VFR, "gop": 7, "options": B_FRAMES}, True),
    "h264 matroska": (("libx264", "matroska", 60), {"options": B_FRAMES}, True),
    "h264 fragments": (("libx264", "mp4", 60), {"mux": {"movflags": "frag_keyframe+empty_moov"}}, True),
    "h264 10 bit": (("libx264", "mp4", 60), {"pix_fmt": "yuv420p10le"}, True),
    "h264 open GOP": (("libx264", "mp4", 60), {"options": OPEN, "gop": 8}, False),
    "h264 transport stream": (("libx264", "mpegts", 60), {"options": B_FRAMES}, False),
    "hevc": (("libx265", "mp4", 60), {"options": {"preset": "fast", "x265-params": X265_CLOSED}, "gop": 8}, True),
    "vp9": (("libvpx-vp9", "webm", 60), {}, True),
    "vp9 VFR": (("libvpx-vp9", "webm", 60), {"pts": VFR, "gop": 7}, True),
    "vp9 mp4": (("libvpx-vp9", "mp4", 60), {}, True),
    "vp8": (("libvpx", "webm", 60), {}, True),
    "mjpeg": (("mjpeg", "matroska", 60), {"pix_fmt": "yuvj420p"}, True),
}


def store(data: bytes, **options) -> dict[str, bytes]:
    return {f"0.mp4.{suffix}" if suffix else "0.mp4": piece for suffix, piece in video.members(data, **options)}


def frames_of(clip: video.StoredClip, wanted) -> np.ndarray:
    return np.concatenate([video.decode(data, indices) for data, indices in clip.cut(wanted)])


def same_info(one: video.Info, other: video.Info) -> bool:
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return np.array_equal(a.pop("timestamps"), b.pop("timestamps")) and a == b


@pytest.mark.parametrize("name", KINDS)
def test_segments_give_the_frames_of_the_whole(name, clip):
    args, options, can_be_cut = KINDS[name]
    data = clip(*args, **options)
    stored = store(data, segment_seconds=0.9)
    assert next(iter(stored)) == "0.mp4.packets"
    assert ("0.mp4.001.mp4" in stored or "0.mp4.001.webm" in stored or "0.mp4.001.mkv" in stored) == can_be_cut
    assert ("0.mp4" in stored) != can_be_cut
    read = video.StoredClip(stored, "0.mp4")
    assert same_info(read.info, video.probe(data))
    whole = video.decode(data, range(60))
    np.testing.assert_array_equal(frames_of(read, range(60)), whole)
    unsorted = [59, 3, 3, 31, 0, 58, 30, 29]
    np.testing.assert_array_equal(frames_of(read, unsorted), whole[unsorted])
    for i in (0, 24, 25, 59):
        np.testing.assert_array_equal(frames_of(read, [i]), whole[[i]])


def test_a_short_clip_is_stored_as_it_is_and_reads_the_same_without_its_table(clip):
    data = clip("libx264", "mp4", 60)
    stored = store(data)
    assert list(stored) == ["0.mp4.packets", "0.mp4"] and stored["0.mp4"] == data
    bare = video.StoredClip({"0.mp4": data}, "0.mp4")
    assert same_info(bare.info, video.StoredClip(stored, "0.mp4").info)
    np.testing.assert_array_equal(frames_of(bare, [7, 50]), video.decode(data, [7, 50]))


def test_what_an_edit_list_hides_stays_hidden(clip, with_late_start):
    data = with_late_start(clip("libx264", "mp4", 60, options=B_FRAMES), 512 * 6)
    n = video.probe(data).n_frames
    assert 40 <= n < 60
    read = video.StoredClip(store(data, segment_seconds=0.5), "0.mp4")
    assert len(read.parts(range(n))) > 2 and same_info(read.info, video.probe(data))
    np.testing.assert_array_equal(frames_of(read, range(n)), video.decode(data, range(n)))


def test_segments_hold_at_most_so_many_seconds_and_bytes(clip):
    data = clip("libx264", "mp4", 60)
    limit = int(video.scan(data).size[:20].sum())
    for options in ({"segment_seconds": 0.85}, {"segment_bytes": limit}):
        pieces = [(name, piece) for name, piece in video.members(data, **options) if name != "packets"]
        assert [name for name, _ in pieces] == [f"{i:03}.mp4" for i in range(len(pieces))] and len(pieces) >= 2
        tables = [video.scan(piece) for _, piece in pieces]
        assert sum(len(table.pts) for table in tables) == 60 and len(tables[0].pts) == 20
        if "segment_bytes" in options:
            assert all(table.size.sum() <= limit for table in tables)
        else:
            assert {len(table.pts) for table in tables} == {20}


@pytest.mark.parametrize("name", ["h264 B-frames", "vp9", "mjpeg"])
def test_the_same_clip_gives_the_same_bytes(name, clip, tmp_path):
    args, options, _ = KINDS[name]
    data = clip(*args, **options)
    path = tmp_path / "clip"
    path.write_bytes(data)
    assert store(data, segment_seconds=0.9) == store(path, segment_seconds=0.9)


def test_a_table_says_what_a_user_asks_about_a_clip(clip):
    data = clip("libx264", "mp4", 60)
    stored = video.StoredClip(store(data, segment_seconds=0.9), "0.mp4").stored
    assert stored is not None
    assert stored.media["bytes"] == len(data) and len(stored.media["sha256"]) == 64 and stored.media["rate"] == 25
    table = stored.table
    assert (np.diff(table.pts[table.frames]) == table.duration[0]).all()
    for at, size in zip(table.pos.tolist(), table.size.tolist()):
        assert data[at : at + 4] == (size - 4).to_bytes(4, "big") or data[at + 4] & 31 in (
            6,
            7,
        )  # a unit, or parameters


def test_only_the_segments_that_are_needed_are_read(clip, tmp_path):
    stored = store(clip("libx264", "mp4", 60), segment_seconds=0.9)
    read: dict = {"0.mp4.packets": stored["0.mp4.packets"]}
    read |= {name: Stretch(str(tmp_path / "gone"), 0, len(data)) for name, data in stored.items() if name not in read}
    read["0.mp4.001.mp4"] = stored["0.mp4.001.mp4"]
    late = video.StoredClip(read, "0.mp4")
    assert late.info.n_frames == 60
    assert [len(indices) for _, indices in late.cut([20, 39])] == [2]
    with pytest.raises(DataError, match="gone: cannot be read") as error:
        late.cut([0])
    assert error.value.reason == "unreadable shard"


def test_a_file_that_ends_before_a_member_is_named(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"abc")
    assert Stretch(str(tmp_path / "cut.tar"), 1, 2).read() == b"bc"
    with pytest.raises(DataError, match=r"cut\.tar: ends 2 bytes before the end of a member"):
        Stretch(str(tmp_path / "cut.tar"), 1, 4).read()


def test_bad_tables_and_missing_members_are_refused(clip):
    stored = store(clip("libx264", "mp4", 60))
    table = stored["0.mp4.packets"]
    newer = dict(np.load(io.BytesIO(table)))
    newer["head"] = np.frombuffer(newer["head"].tobytes().replace(b'"version": 1', b'"version": 7'), np.uint8)
    out = io.BytesIO()
    np.savez(out, **newer)
    for bad, said in (
        (b"", "BadZipFile"),
        (table[:-30], "BadZipFile"),
        (b"junk" * 9, "BadZip"),
        (out.getvalue(), "version 7"),
    ):
        with pytest.raises(DataError, match=rf"video 0\.mp4: its packet table cannot be read.*{said}"):
            _ = video.StoredClip({**stored, "0.mp4.packets": bad}, "0.mp4").info
    with pytest.raises(IndexError, match=r"frame 60 asked for, it has 0\.\.59"):
        video.StoredClip(stored, "0.mp4").parts([0, 60])
    with pytest.raises(DataError, match=r"has no member 0\.mp4;"):
        video.StoredClip({"0.mp4.packets": table}, "0.mp4").parts([0])


def test_a_clip_that_does_not_survive_cutting_is_stored_whole(clip, monkeypatch, caplog):
    from keye_data.video import stored as module

    data = clip("libx264", "mp4", 60)
    monkeypatch.setattr(module, "remux", lambda *_: clip("libx264", "mp4", 40))
    with caplog.at_level(logging.WARNING):
        assert store(data, segment_seconds=0.9)["0.mp4"] == data
    assert "stored whole" in caplog.text
