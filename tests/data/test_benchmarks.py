"""The data benchmarks on small clips: every part runs, and none of them times a decoder that returns the wrong frames."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_data, clips, decoders, end_to_end, ffmpeg, fill, gate, nvdec, tables, trimming
from keye_data import video

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WITH_BUFFER = sorted(path.stem for path in RECIPES.glob("*.yaml") if "packing_buffer:" in path.read_text())
BUFFER = re.compile(r"# samples waiting to be packed: (.*)\n  packing_buffer: (\d+)")
FIGURES = re.compile(r"(\d+) fill rows of ([\d,]+) to (0\.\d+) \(data_pipeline/benchmarks\), (\d+) to (0\.\d+)")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> clips.Clips:
    return clips.generated(tmp_path_factory.mktemp("clips"), frames=96, hour=12.0, size=(192, 128))


def test_clips_hold_what_they_say(made):
    one, vp9, looped = (video.probe(path) for path in (made.h264, made.vp9, made.h264_hour))
    assert (one.codec, vp9.codec) == ("h264", "vp9") and one.n_frames == vp9.n_frames == 96
    assert looped.n_frames == 3 * 96 and video.scan(made.h264_hour).exact
    frames = video.decode(made.h264_hour, [5, 96 + 5, 2 * 96 + 95])  # the same packets, so the same pixels
    assert (frames[0] == frames[1]).all() and (frames[2] == video.decode(made.h264, [95])[0]).all()
    keys = np.flatnonzero(video.scan(made.vp9).sync)
    assert len(keys) > 1 and np.diff(keys).max() <= 48


@pytest.mark.parametrize(
    "wrong",
    [
        lambda frames: np.roll(frames, 1, axis=0),
        lambda frames: frames[:-1],
        lambda frames: frames // 2,
    ],
    ids=["shifted", "one short", "darker"],
)
@pytest.mark.parametrize(("codec", "backend", "tolerance"), [("h264", "pyav", 0.0), ("vp9", "dali", 4.0)])
def test_a_wrong_decoder_is_not_timed(made, wrong, codec, backend, tolerance):
    clip = str(getattr(made, codec))
    indices = [0, 7, 8, 40, 95]
    right = lambda clip, indices: video.decode(clip, indices, backend, device="cpu")  # noqa: E731
    row = decoders.timed(right, clip, indices, 1, tolerance)
    assert row["cpu"] > 0 and row["count"] == 5 and row["worst_difference"] <= tolerance
    with pytest.raises(gate.WrongFrames, match="asked for"):
        decoders.timed(lambda *asked: wrong(right(*asked)), clip, indices, 1, tolerance)


def test_a_frame_off_by_one_is_caught_within_the_tolerance(made):
    """DALI's colours may differ; a neighbour may not stand in."""
    frames = video.decode(made.vp9, [10, 21, 30], "dali", device="cpu")
    with pytest.raises(gate.WrongFrames, match=r"asked for frame 20.*frame 21 is nearest"):
        gate.check(made.vp9, frames, [10, 20, 30], 255.0)


def test_a_process_that_finds_wrong_frames_stops_the_benchmark(made):
    task = {"decoder": "keye_data pyav", "clip": str(made.h264), "indices": [95, 96], "repeats": 1}
    with pytest.raises(RuntimeError, match=r"decoders\.py: .*frame 96 asked for"):
        decoders.child("decoders.py", task)


def test_ratios_are_to_torchcodec_or_else_to_pyav():
    def rows(*named: tuple[str, float]) -> list[dict]:
        return [
            {"codec": "h264", "frames": "all", "decoder": name, "cpu": cpu, "wall": cpu, "count": 10}
            for name, cpu in named
        ]

    with_it = decoders.with_ratios(rows((decoders.BASELINE, 1.0), ("keye_data pyav", 2.0)))
    assert [(row["ratio"], row["ratio_to"]) for row in with_it] == [(1.0, decoders.BASELINE), (0.5, decoders.BASELINE)]
    missing = {"codec": "h264", "frames": "all", "decoder": decoders.BASELINE, "unverified": "not installed"}
    without = decoders.with_ratios([missing, *rows(("keye_data pyav", 2.0), ("keye_data dali", 4.0))])
    assert [row.get("ratio") for row in without] == [None, 1.0, 0.5] and without[2]["ratio_to"] == "keye_data pyav"
    assert "not installed: unverified" in tables.decoders(_with_machine({"rows": [{**without[0]}]}))


def test_trimmed_and_whole_give_the_same_pixels(made):
    indices = np.linspace(0, 287, 5).round().astype(int).tolist()
    for decoder, clip in (("dali", made.vp9_hour), ("pyav in order", made.h264_hour)):
        whole = trimming.frames_of(decoder, "whole", str(clip), indices)
        trimming.same(whole, trimming.frames_of(decoder, "trimmed", str(clip), indices), decoder)
        other = trimming.frames_of(decoder, "trimmed", str(clip), [*indices[:-1], indices[-1] - 1])
        with pytest.raises(gate.WrongFrames, match="frame 4 of 5 differs"):
            trimming.same(whole, other, decoder)


@pytest.mark.slow  # two loaders with their worker processes
def test_the_loader_is_measured_against_its_own_pixels(made, qwen_tiktoken):
    task = {"backend": "pyav", "clip": str(made.h264), "tokenizer": str(qwen_tiktoken), "piece": 1.0}
    row = end_to_end.run({**task, "rounds": 1, "batches": 1})
    assert row["frames"] > 0 and row["settings"]["clips"] == 4 and row["ratio"] > 0
    assert str(row["target"]) in tables.loader(_with_machine({"rows": [{"backend": "pyav", **row}]}))

    def late(data: bytes, frames: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        return video.decode(data, [max(0, i - 1) for i in frames], "pyav", size)

    with pytest.raises(gate.WrongFrames, match="is not the bare decoder's"):
        end_to_end.run({**task, "rounds": 1, "batches": 1}, late)


@pytest.mark.slow  # processes that import torch and DALI
def test_threads_are_rehearsed_on_a_cpu(made):
    found = nvdec.measure(made, 1, "not installed", "cpu")
    assert [row["threads"] for row in found["rows"] if row["decoder"] == "dali"] == [1, 2]
    table = tables.nvdec(_with_machine(found))
    assert "GPU `unverified`" in table and "not installed: unverified" in table


def test_options_without_effect_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_data.main(["--only", "fill", "--device", "cpu"])
    assert "only nvdec has one" in capsys.readouterr().err


def test_quick_figures_do_not_replace_the_committed_ones(capsys, monkeypatch):
    before = bench_data.RESULTS.read_bytes()
    monkeypatch.chdir(bench_data.RESULTS.parent)
    with pytest.raises(SystemExit):
        bench_data.main(["--only", "fill", "--quick", "--out", bench_data.RESULTS.name])
    assert "holds the committed figures" in capsys.readouterr().err
    assert bench_data.RESULTS.read_bytes() == before


def test_a_part_is_written_beside_the_others(tmp_path):
    out = tmp_path / "figures.json"
    out.write_text(json.dumps({"trim": "as it was"}))
    assert bench_data.main(["--only", "fill", "--quick", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["trim"] == "as it was" and written["fill"]["machine"]["date"]
    # nothing in it hangs on the machine, so the committed figures are these
    figures = [
        {k: v for k, v in one.items() if k not in ("machine", "quick")}
        for one in (written["fill"], committed()["fill"])
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("recipe", WITH_BUFFER)
def test_recipes_state_the_measured_fill_of_their_own_row(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    row = int(re.findall(r"^  seq_length: (\d+)", text, re.MULTILINE)[0])
    said, buffer = BUFFER.findall(text)[0]
    (one,) = FIGURES.findall(said)
    found = committed()["fill"]
    fills = found["fill"] if row == found["settings"]["row"] else found["other_rows"][str(row)]["fill"]
    assert one[0] == buffer and int(one[1].replace(",", "")) == row
    assert (one[2], one[4]) == (f"{fills[one[0]]:.3f}", f"{fills[one[3]]:.3f}")
    assert fills[buffer] >= fill.TARGET


def test_the_version_of_a_borrowed_torchcodec_is_told(tmp_path):
    info = tmp_path / "torchcodec-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchcodec\nVersion: 1.2.3\n")
    assert ffmpeg.version({"PYTHONPATH": str(tmp_path)}) == "1.2.3"
    for part in ("decoders", "nvdec"):
        found = committed()[part]
        measured = any("torchcodec" in row["decoder"] and "cpu" in row for row in found["rows"])
        assert "torchcodec" in found["machine"]["packages"] or not measured


def test_every_row_of_the_trim_has_its_own_count_of_frames():
    found = committed()["trim"]
    for number, row in enumerate(found["rows"]):
        row["of_frames"] = 1000 + number
    table = tables.trim(found)
    for row in found["rows"]:
        assert f"| {row['form']} | {found['settings']['frames']} of {row['of_frames']} | {row['cpu']:.1f} |" in table


def test_readme_holds_the_committed_results():
    document = committed()
    text = tables.README.read_text()
    assert tables.filled(text, document) == text
    assert set(document) == set(tables.TABLES)
    document["fill"]["fill"]["16"] = 0.5
    assert tables.filled(text, document) != text


def _with_machine(found: dict) -> dict:
    here = {"processor": "-", "cores": 1, "load_at_start": 0.0, "packages": {}, "date": "-"}
    return {"machine": here, "quick": True, **found}


def committed() -> dict:
    return json.loads(bench_data.RESULTS.read_text())
