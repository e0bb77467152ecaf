"""tools/build_shards.py and tools/inspect_shards.py as commands: what they print, draw and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye_data.shards import Options, build
from keye_data.shards.inspect import samples
from keye_data.shards.sheet import CELL, spread
from tools import build_shards, inspect_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_picture, make_clip) -> Path:
    """A captioned picture, clip and film in pieces, and a sample whose clip is broken."""
    folder = tmp_path_factory.mktemp("media")
    for name, data in (
        ("a.png", make_picture(40, 60)),
        ("b.mp4", make_clip(8)),
        ("c.mp4", make_clip(100)),
        ("d.mp4", b"no film"),
    ):
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"Grüße [bold] of {name}")
    out = folder.parent / f"{folder.name} shards"
    build(folder, out, Options(samples_per_shard=2, segment_seconds=8, on_error="keep"))
    return out


def test_build_prints_what_it_did(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    lines = [json.dumps({"conversations": turns}), "{", json.dumps({"conversations": turns})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "tools" / "build_shards.py"), str(tmp_path / "x.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "x.jsonl: sharegpt (told by looking)" in done.stdout
    assert "x.jsonl, line 2: not JSON" in done.stderr and "the same command goes on" in done.stderr
    done = subprocess.run([*command, "--on-error", "skip"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 samples in 2 shards" in done.stdout, done.stderr
    assert "1 bad samples were left out" in done.stdout and "1 samples repeat others" in done.stdout
    assert "3/3" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such file or folder"),
        (["none", "--shard-bytes", "big"], "'big' is no size"),
        (["none", "--reencode", "fps=-1"], "--reencode fps=-1"),
        (["none", "--workers", "0"], "--workers 0"),
        (["none", "--samples-per-shard", "0"], "--samples-per-shard 0"),
        (["none", "--segment-seconds", "nan"], "--segment-seconds nan"),
        (["none", "--budget", "a=3"], "--budget needs --tokenizer"),
    ],
)
def test_build_refuses(tmp_path, capsys, arguments, message):
    assert build_shards.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2 and not list(tmp_path.iterdir())


def test_inspect_table(shards, capsys):
    inspect = inspect_shards.main
    assert inspect([str(shards)]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert [row[1:4] for row in cells[:3]] == [
        ["000000000", "image x 1", ""],
        ["000000001", "video x 1", "2.0"],
        ["000000002", "video x 1", "25.0"],
    ]
    assert cells[0][4] == "Grüße [bold] of a.png" and "cannot be used: video" in cells[3][4]
    for asked in ("2", "000000002"):
        assert inspect([str(shards), "--sample", asked]) == 0
        out = capsys.readouterr().out
        assert "c.mp4" in out and "a.png" not in out
    assert inspect([str(shards), "--sample", "9"]) == 1
    assert "it has no sample 9" in capsys.readouterr().err


def test_contact_sheet(shards, tmp_path, capsys):
    inspect, sheet = inspect_shards.main, tmp_path / "sheet.png"
    assert inspect([str(shards), "--sheet", str(sheet)]) == 0
    assert "14 pictures and frames" in capsys.readouterr().out  # 1 picture, 6 frames of each clip, 1 reason
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape[1] > 6 * CELL[1]
    # the clips' frames are grey and grow lighter, frame by frame: so do the cells of their rows
    assert inspect([str(shards), "--sample", "1", "--sheet", str(sheet)]) == 0
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    middles = [int(pixels[22 + 6 + CELL[0] // 2, 6 + i * (CELL[1] + 6) + CELL[1] // 2, 0]) for i in range(6)]
    indices = spread(8)
    assert indices == [0, 1, 3, 4, 6, 7]
    assert np.abs(np.array(middles) - 8 * np.array(indices)).max() <= 3


def test_inspect_without_an_index(shards, tmp_path, capsys):
    """Shards of other tools: no list of samples, no packet tables."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "s.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    assert [sample.line for sample in samples(tmp_path / "x")] == [{}, {}]
    assert inspect_shards.main([str(tmp_path / "x")]) == 0
    assert " 2.0 " in capsys.readouterr().out


def test_inspect_refuses(tmp_path, shards, capsys):
    inspect = inspect_shards.main
    assert inspect([str(shards), "--limit", "0"]) == 1 and "--limit 0" in capsys.readouterr().err
    assert inspect([str(shards), "--sheet", "a.txt"]) == 1 and "ends in .png" in capsys.readouterr().err
    assert inspect([str(tmp_path / "none")]) == 1 and "no such folder; build" in capsys.readouterr().err
    assert inspect([str(tmp_path)]) == 1 and "holds no shards" in capsys.readouterr().err
    (tmp_path / "bad.tar").write_bytes(b"x" * 3000)
    assert inspect([str(tmp_path)]) == 1 and "bad.tar" in capsys.readouterr().err
    data = (shards / "shard-000000.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(data[: len(data) // 2])
    assert inspect([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "damaged" in error or "cut short" in error
    (tmp_path / "bad.tar").write_bytes(data)
    (tmp_path / "samples.jsonl").write_text("{")
    assert inspect([str(tmp_path)]) == 1 and "not a list of samples" in capsys.readouterr().err
