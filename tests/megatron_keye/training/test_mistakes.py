"""What a user gets wrong: one clear line, a non-zero exit, no traceback. What the data gets wrong: skipped, counted, named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from training_runs import command, finish, metrics, start

from keye_data.shards import build_shards
from keye_data.synthetic import generate
from megatron_keye.training import checkpoint


def error_lines(words: list[str], env: dict[str, str] | None = None) -> list[str]:
    """What a failing command says; it must leave with a code, and without a traceback."""
    before = {k: os.environ.get(k) for k in env or {}}
    os.environ.update(env or {})
    try:
        code, text = finish(start(words))
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    assert code not in (0, None), text
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error")]


MISTAKES = {
    "unknown key": ("optimizer.lrr=1", {}, ["optimizer.lrr", "optimizer.lr"]),
    "wrong type": ("training.steps=many", {}, ["training.steps", "many"]),
    "impossible layout": ("parallel.tensor=3", {"WORLD_SIZE": "3"}, ["parallel.tensor", "2"]),
    "world size does not fit": ("parallel.pipeline=2", {"WORLD_SIZE": "3"}, ["3", "pipeline"]),
    "missing shards": ("data.sources.0.path=/nowhere/shards", {}, ["/nowhere/shards", "build_shards.py"]),
    "nothing to start from": ("training.init_from=/nowhere/run", {}, ["/nowhere/run"]),
    "tokenizer of another model": ("model.image_token_id=7", {}, ["model.image_token_id", "151655"]),
    "missing tokenizer": ("data.tokenizer=/nowhere/qwen.tiktoken", {}, ["/nowhere/qwen.tiktoken"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_line_a_fault(name: str, clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    override, env, expected = MISTAKES[name]
    lines = error_lines(command(tmp_path / "run", clip_shards, qwen_tiktoken, override), env)
    assert 1 <= len(lines) <= 4, "one line a fault"
    assert all(word in lines[0] for word in expected), lines


def test_recipe_not_found(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    (line,) = error_lines(command(tmp_path / "run", clip_shards, qwen_tiktoken, recipe="stage11"))
    assert "stage11.yaml" in line and "stage1" in line


def test_debug_keeps_the_traceback(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    code, text = finish(start([*command(tmp_path / "run", clip_shards, qwen_tiktoken, "optimizer.lrr=1"), "--debug"]))
    assert code and "Traceback" in text


def test_empty_shard_folder(qwen_tiktoken: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (line,) = error_lines(command(tmp_path / "run", tmp_path / "empty", qwen_tiktoken))
    assert str(tmp_path / "empty") in line and "build_shards.py" in line


@pytest.mark.slow  # two runs, the first with a checkpoint
def test_checkpoint_of_another_model(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, "training.steps=1")
    code, text = finish(start(words))
    assert code == 0, text
    (line,) = error_lines([*words, "training.steps=2", "model.moe_ffn_hidden_size=32"])
    assert "moe_ffn_hidden_size" in line and "64" in line and "32" in line
    damaged = next((tmp_path / "run" / "checkpoints").glob("iter_*/__0_0.distcp"))
    with damaged.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff" * 8)
    (line,) = error_lines([*words, "training.steps=2"])
    assert str(damaged) in line and "damaged" in line


@pytest.mark.slow  # a run with two checkpoints
def test_disk_full_keeps_the_checkpoint_before(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        words = command(disk / "run", clip_shards, qwen_tiktoken, "training.steps=4", "checkpoint.interval=2")
        (line,) = error_lines(words)
        assert "disk full" in line and "iter_0000002" in line, line
        root = disk / "run" / "checkpoints"
        assert [f.name for f in root.iterdir() if f.is_dir()] == ["iter_0000002"]
        checkpoint.verify(root / "iter_0000002")
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


@pytest.mark.slow  # a run of its own
def test_broken_samples_are_skipped_counted_and_named(qwen_tiktoken: Path, tmp_path: Path):
    """Among good clips: one cut short, one undecodable picture, and a tar that ends in the middle of a sample."""
    source = tmp_path / "source"
    generate(source, 60)
    clips = sorted((source / "clips").iterdir())
    clips[3].write_bytes(clips[3].read_bytes()[:200])
    clips[5].write_bytes(b"not a clip at all")
    pictures = tmp_path / "pictures"
    generate(pictures, 20, kind="pictures")
    image = sorted(p for p in pictures.rglob("*.png"))[4]
    image.write_bytes(image.read_bytes()[:60])
    build_shards(source, tmp_path / "clip_shards", samples_per_shard=30)
    build_shards(pictures, tmp_path / "picture_shards")
    tar = sorted((tmp_path / "clip_shards").glob("*.tar"))[1]
    whole = tar.read_bytes()
    with tarfile.open(tar) as members:
        last = members.getmembers()[-3]
    tar.write_bytes(whole[: last.offset_data + 10])

    sources = f"[{{path: {tmp_path}/clip_shards, weight: 1.0}}, {{path: {tmp_path}/picture_shards, weight: 1.0}}]"
    words = command(tmp_path / "run", tmp_path, qwen_tiktoken, "training.steps=8", "checkpoint.interval=null")
    words = [f"data.sources={sources}" if w.startswith("data.sources=") else w for w in words]
    code, text = finish(start(words))
    assert code == 0, text
    last_row = metrics(tmp_path / "run")[-1]
    assert last_row["iteration"] == 8 and last_row["skipped-samples"] >= 4
    reasons = last_row["skipped-samples-by-reason"]
    assert len(reasons) >= 3, reasons
    assert text.count("skipped,") >= 4, text
    assert "train-0-000005" in text or "000005" in text
    report = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in report) == reasons
    assert all(line["key"] in line["message"] and 1 <= line["iteration"] <= 8 for line in report)
    assert {f"{tmp_path}/clip_shards", f"{tmp_path}/picture_shards"} == {line["source"] for line in report}
    by_source = last_row["consumed-samples-by-source"]
    assert sum(by_source.values()) == last_row["consumed samples"] and len(by_source) == 2
    left_out = Counter(line["source"] for line in report if not line["masked"])
    for source, size in ((f"{tmp_path}/clip_shards", 60), (f"{tmp_path}/picture_shards", 20)):
        assert last_row["epochs-by-source"][source] == (by_source[source] + left_out[source]) / size
    shutil.rmtree(tmp_path / "run")
