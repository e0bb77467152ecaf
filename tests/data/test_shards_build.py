"""Builds give the same bytes however they ran, go on after a kill, and report what they found."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from keye_data import video
from keye_data.errors import DataError
from keye_data.loader import Loader
from keye_data.processor import Processor
from keye_data.settings import DataConfig, SourceConfig
from keye_data.shards import Options, Reencode, Summary, build
from keye_data.shards.executors import Processes, Ray
from keye_data.shards.growing import finished_shards, growing_folder
from keye_data.shards.options import parse_bytes
from keye_data.shards.reencode import at_rate, reencode
from keye_data.shards.tokens import parse_budget

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
data:
  tokenizer: unused
  seq_length: 400
  image: {max_tokens: 16}
  video: {min_frame_tokens: 4, max_frame_tokens: 6, total_tokens: 256}
"""


def ask(*media: str, answer: str = "!") -> dict:
    parts = [{"type": kind, kind: name} for name in media for kind in ["video" if name.endswith("mp4") else "image"]]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}
    return {"messages": [turn, {"role": "assistant", "content": answer}]}


def write_lines(folder: Path, records: list[dict]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_picture, make_clip) -> Path:
    """14 samples: pictures, clips, both, text, and some twice."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(3):
        (folder / f"{i}.png").write_bytes(make_picture(56, 28 + 28 * i, i))
        (folder / f"{i}.mp4").write_bytes(make_clip(40 + i, seed=i))
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    records = [ask("0.png"), ask("0.mp4"), ask("1.png", "1.mp4"), {"text": "words " * 20}, ask("copy.png")]
    records += [ask("0.png", answer="other"), ask("2.mp4", "2.png"), {"text": "x"}, {"text": "x", "id": 3}]
    records += [ask("1.mp4", "2.mp4", "1.mp4"), *({"text": f"document {i} " * 150} for i in range(4))]
    write_lines(folder, records)
    return folder


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file but the data base, which Energon fills in the order of its processes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "index.sqlite"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def entries(folder: Path, name: str = "samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def names(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [f"{path.name}/{member.name}" for member in tar]
    return found


def test_processes_give_the_same_bytes(source, tmp_path):
    options = Options(samples_per_shard=3)
    counts: list[int] = []
    alone = build(source, tmp_path / "alone", options, progress=counts.append)
    both = build(source, tmp_path / "both", options, pool=lambda: Processes(2))
    assert alone == both == Summary(14, 5, 0, 0, 0, shared_media=3, identical=2) and sum(counts) == 14
    assert content(tmp_path / "alone") == content(tmp_path / "both")
    assert {"samples.jsonl", "duplicates.json", "shard-000004.tar", ".nv-meta/index.uuid"} < set(
        content(tmp_path / "both")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both"]


@pytest.mark.ray
@pytest.mark.slow  # starts a Ray cluster of two processes
def test_ray_gives_the_same_bytes(source, tmp_path):
    options = Options(samples_per_shard=3)
    build(source, tmp_path / "alone", options)
    there = build(source, tmp_path / "there", options, pool=lambda: Ray("local", 2))
    assert there.samples == 14 and content(tmp_path / "alone") == content(tmp_path / "there")
    (source / "data.jsonl").with_name("bad").mkdir()
    write_lines(source / "bad", [{"text": "fine"}, {"text": 3}])
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: `text` must be text"):
        build(source / "bad", tmp_path / "bad", options, pool=lambda: Ray("local", 2))
    with pytest.raises(DataError, match=r"--ray: the Ray cluster 127\.0\.0\.1:1 cannot be reached"):
        build(source, tmp_path / "bad", options, pool=lambda: Ray("127.0.0.1:1", 2))


def test_without_ray(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r'--ray needs Ray, which is not installed: pip install "ray'):
        build(source, tmp_path / "out", Options(), pool=lambda: Ray("", 1))
    assert not list(tmp_path.iterdir())


def test_what_the_lists_say(source, tmp_path):
    build(source, tmp_path / "out", Options(samples_per_shard=100))
    lines = entries(tmp_path / "out")
    assert [line["key"] for line in lines] == [f"{i:09d}" for i in range(14)]
    assert lines[2]["origin"] == "data.jsonl, line 3" and lines[2]["shard"] == "shard-000000.tar"
    picture, film = lines[2]["media"]
    assert (picture["name"], picture["kind"], picture["width"], picture["height"]) == ("0.png", "image", 56, 56)
    assert (film["frames"], film["seconds"], film["codec"], film["width"]) == (41, 10.25, "h264", 96)
    assert film["sha256"] == hashlib.sha256((source / "1.mp4").read_bytes()).hexdigest()
    assert film["bytes"] == (source / "1.mp4").stat().st_size
    assert "shard-000000.tar/000000002.1.mp4.packets" in names(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "duplicates.json").read_text())
    same = hashlib.sha256((source / "0.png").read_bytes()).hexdigest()
    assert report["media"][same] == ["000000000", "000000004", "000000005"]
    # the same words and pixels, whatever the file is called; another answer or id alone makes no difference or one
    assert sorted(report["samples"].values()) == [["000000000", "000000004"], ["000000007", "000000008"]]


def test_shards_do_not_grow_without_end(source, tmp_path):
    done = build(source, tmp_path / "out", Options(samples_per_shard=5, shard_bytes=20_000))
    found = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert found[:2] == ["shard-000000-001.tar", "shard-000000.tar"] and done.shards == len(found) > 3
    assert sorted({line["shard"] for line in entries(tmp_path / "out")}) == found
    info = json.loads((tmp_path / "out" / ".nv-meta" / ".info.json").read_text())
    assert sum(info["shard_counts"].values()) == 14


def test_token_counts_are_those_of_training(source, tmp_path, tokenizer, qwen_tiktoken):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    options = Options(samples_per_shard=5, tokenizer=qwen_tiktoken, budgets=(str(recipe), "large=4096"))
    build(source, tmp_path / "out", options)
    lines = entries(tmp_path / "out")
    for name, text in (("small", str(recipe)), ("large", "large=4096")):
        settings = parse_budget(text)[1]
        settings.sources, settings.workers = [SourceConfig(str(tmp_path / "out"))], 0
        settings.packing, settings.shuffle_buffer = False, 1
        loader = Loader(settings, Processor(tokenizer, settings), rank=0, world_size=1, micro_batch_size=1, seed=0)
        counts = {line["key"]: line["tokens"][name] for line in lines}
        fitting = {key: count for key, count in counts.items() if count is not None}
        assert len(fitting) == (10 if name == "small" else 14)
        seen = {}
        for _ in fitting:
            batch = next(loader)
            seen[batch.keys[0].rsplit("/", 1)[1]] = int((batch.key_stop > batch.key_start).sum())
        assert seen == fitting
        loader.close()
    assert lines[1]["tokens"]["small"] < lines[1]["tokens"]["large"]


def test_budgets(tmp_path, source, qwen_tiktoken):
    name, settings = parse_budget(str(ROOT / "recipes" / "stage1.yaml"))
    assert name == "stage1" and isinstance(settings, DataConfig) and settings.video.total_tokens == 24576
    (tmp_path / "bad.yaml").write_text("data: {video: {fsp: 1}}")
    (tmp_path / "worse.yaml").write_text("data: [")
    for text, message in (
        (str(tmp_path / "none.yaml"), "no such recipe file"),
        (str(tmp_path / "bad.yaml"), "fsp"),
        (str(tmp_path / "worse.yaml"), "worse.yaml"),
        (str(source / "data.jsonl"), "data.jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            parse_budget(text)
    with pytest.raises(DataError, match="two budgets named a"):
        build(source, tmp_path / "out", Options(tokenizer=qwen_tiktoken, budgets=("a=9", "a=8")))
    with pytest.raises(DataError, match="--budget needs --tokenizer"):
        build(source, tmp_path / "out", Options(budgets=("a=9",)))
    # a wrong tokenizer is no bad sample
    with pytest.raises(DataError, match="no such file or folder; give"):
        build(source, tmp_path / "out", Options(tokenizer=tmp_path / "no", budgets=("a=9",), on_error="skip"))


def test_bad_samples_and_what_is_done_about_them(tmp_path, make_clip):
    folder = tmp_path / "in"
    folder.mkdir()
    clip = make_clip(40)
    (folder / "good.mp4").write_bytes(clip)
    (folder / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    source = write_lines(folder, [ask("good.mp4"), ask("cut.mp4"), {"text": "t"}, ask("none.png"), {"text": "u"}])
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: .*cut\.mp4: video .*cut"):
        build(source, tmp_path / "out", Options(samples_per_shard=1))
    # the first shard is whole, and stays; what is chosen about errors may change
    assert finished_shards(tmp_path / "out") == 1 and not (tmp_path / "out").exists()
    done = build(source, tmp_path / "out", Options(samples_per_shard=1, on_error="skip"))
    assert done == Summary(3, 3, bad=2, damaged=0, kept=1, shared_media=0, identical=0)
    bad = entries(tmp_path / "out", "bad.jsonl")
    assert [(line["origin"], line["reason"]) for line in bad] == [
        ("data.jsonl, line 2", "damaged video"),
        ("data.jsonl, line 4", "missing media"),
    ]
    assert [line["key"] for line in entries(tmp_path / "out")] == ["000000000", "000000002", "000000004"]
    with pytest.raises(DataError, match=r"line 4: the media file .* is missing"):  # keeping needs something to keep
        build(source, tmp_path / "kept", Options(on_error="keep"))
    write_lines(folder, [ask("good.mp4"), ask("cut.mp4")])
    assert build(source, tmp_path / "kept", Options(on_error="keep")).damaged == 1
    assert "cut" in entries(tmp_path / "kept")[1]["media"][0]["problem"]
    assert [name for name in names(tmp_path / "kept") if "000000001" in name] == [
        "shard-000000.tar/000000001.0.mp4",
        "shard-000000.tar/000000001.json",
    ]
    write_lines(folder, [ask("cut.mp4")])
    with pytest.raises(DataError, match="holds no sample; all 1 records are bad"):
        build(source, tmp_path / "none", Options(on_error="skip"))


def test_choices_that_cannot_have_an_effect_are_refused(source, tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions/a.png").write_bytes((source / "2.png").read_bytes())
    (tmp_path / "captions/a.txt").write_text("A picture.")
    with pytest.raises(DataError, match=r"--media .*: captions have their media beside them"):
        build(tmp_path / "captions", tmp_path / "out", Options(media=source))
    build(tmp_path / "captions", tmp_path / "captions/inside", Options())  # its tars are no pictures
    with pytest.raises(DataError, match="again: it lies among the tars that are read"):
        build(tmp_path / "captions/inside", tmp_path / "captions/inside/again", Options())


def stop_at(source: Path, out: Path, options: Options, finished: int) -> None:
    """A build that ends by an error once `finished` shards are whole."""

    def progress(_: int) -> None:
        if finished_shards(out) == finished:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build(source, out, options, progress=progress)


def test_going_on_keeps_only_what_is_still_true(source, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in source.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    options = Options(samples_per_shard=2)
    out, parts = tmp_path / "out", growing_folder(tmp_path / "out")
    stop_at(folder, out, options, 4)
    (parts / "shard-000009.tar").write_bytes(b"of another source")
    (parts / "shard-000001.tar").write_bytes(b"damaged")  # 1: its bytes
    os.utime(folder / "2.png", ns=(1, 1))  # 3: a file of its samples
    with pytest.raises(DataError, match=r"begun there with samples_per_shard 2, now 3; finish it"):
        build(folder, out, Options(samples_per_shard=3))
    done = build(folder, out, options)
    assert done.kept == 2
    build(folder, tmp_path / "fresh", options)
    assert content(out) == content(tmp_path / "fresh")
    # 0: a record has changed
    stop_at(folder, tmp_path / "two", options, 2)
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join([lines[0].replace("!", "!!"), *lines[1:]]))
    assert build(folder, tmp_path / "two", options).kept == 1


def test_a_file_that_was_missing_and_came(source, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.png").write_bytes((source / "0.png").read_bytes())
    write_lines(folder, [ask("0.png"), ask("late.png"), {"text": "x"}, {"text": "y"}])
    options = Options(samples_per_shard=2, on_error="skip")
    stop_at(folder, tmp_path / "out", options, 1)
    (folder / "late.png").write_bytes((source / "1.png").read_bytes())
    assert build(folder, tmp_path / "out", options).samples == 4
    stop_at(folder, tmp_path / "again", options, 1)
    assert build(folder, tmp_path / "again", options).kept == 1


@pytest.mark.slow  # two runs of the command, whose processes load everything anew
def test_a_killed_build_goes_on(tmp_path, make_clip):
    """SIGKILL to the running command, in the middle: its workers end, and the next run gives what one run would."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(make_clip(150, height=128, width=160, seed=i))
    write_lines(folder, [ask(f"{i}.mp4") for i in range(8)])
    tool = [sys.executable, str(ROOT / "tools" / "build_shards.py"), str(folder), "--workers", "2"]
    tool += ["--samples-per-shard", "1", "--reencode", "fps=4,gop=8,height=128"]
    running = subprocess.Popen([*tool, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not 2 <= finished_shards(out) < 8 and running.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        workers = psutil.Process(running.pid).children(recursive=True)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert 2 <= finished_shards(out) < 8 and not out.exists() and len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=30)[1], "workers outlive their parent"
    finished = finished_shards(out)
    done = subprocess.run([*tool, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"going on: {finished} shards are finished" in done.stdout and f", {finished} kept" in done.stdout
    options = Options(samples_per_shard=1, reencode=Reencode(4, 8, 128))
    build(folder, tmp_path / "fresh", options)
    assert content(out) == content(tmp_path / "fresh")


def test_two_builds_at_once_are_refused(source, tmp_path):
    def second(_: int) -> None:
        with pytest.raises(DataError, match="another build is writing there"):
            build(source, tmp_path / "out", Options())
        seen.append(1)

    seen: list[int] = []
    build(source, tmp_path / "out", Options(), progress=second)
    assert seen


def test_long_films_are_cut(tmp_path, make_clip):
    (tmp_path / "film.mp4").write_bytes(make_clip(100))
    build(write_lines(tmp_path, [ask("film.mp4")]), tmp_path / "out", Options(segment_seconds=8.0))
    found = [name.split("/")[1] for name in names(tmp_path / "out")]
    assert found[0] == "000000000.0.mp4.packets" and found[-1] == "000000000.json"
    assert found[1:-1] == [f"000000000.0.mp4.{i:03}.mp4" for i in range(len(found) - 2)] and len(found) > 4
    with pytest.raises(DataError, match="holds a film in pieces"):
        build(tmp_path / "out", tmp_path / "again", Options())


def test_reencode(tmp_path, make_clip):
    clip = make_clip(100, fps=25, height=90, width=120)
    how = Reencode(fps=5, gop=4, height=64)
    small = reencode(clip, how)
    assert small == reencode(clip, how) and len(small) < len(clip)
    info = video.probe(small)
    assert (info.n_frames, info.height, info.width) == (20, 64, 86)
    assert np.allclose(info.timestamps, np.arange(20) / 5)
    table = video.scan(small)
    assert np.flatnonzero(table.sync).tolist() == [0, 4, 8, 12, 16] and (np.diff(table.pts) > 0).all()
    before = video.decode(clip, range(0, 100, 5), size=(64, 86)).astype(float)
    assert np.abs(before - video.decode(small, range(20))).mean() < 3
    assert at_rate(np.array([0, 0.9995, 5.0]), 1).tolist() == [0, 1, 2]  # uneven, and no frame twice
    assert at_rate(np.array([0.0]), 2).tolist() == [0]
    with pytest.raises(DataError):
        reencode(clip[:2000], how)


def test_reencoded_clips_change_their_name(tmp_path):
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = out.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(16):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * i, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    (tmp_path / "a.txt").write_text("grey")
    build(tmp_path, tmp_path / "out", Options(format="captions", reencode=Reencode()))
    (line,) = entries(tmp_path / "out")
    assert line["media"][0]["name"] == "0.mp4" and line["media"][0]["frames"] == 4
    assert "shard-000000.tar/000000000.0.mp4" in names(tmp_path / "out")


@pytest.mark.parametrize("text", ["fps", "fps=x", "speed=2", "fps=0", "gop=0", "height=2", "crf=60", "fps=nan"])
def test_reencode_choices(text):
    assert Reencode.parse("fps=1.5,gop=7") == Reencode(1.5, 7)
    with pytest.raises(DataError, match="--reencode"):
        Reencode.parse(text)


def test_sizes():
    assert [parse_bytes(text) for text in ("12", "3k", "4G", "1T")] == [12, 3072, 4 << 30, 1 << 40]
    for text in ("", "G", "-1", "1.5G"):
        with pytest.raises(DataError, match="is no size"):
            parse_bytes(text)
