"""Pictures of recall and of selected frames: the figures behind them, and that they are drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_keye.model as m
from keye_data.processor import Processor
from keye_data.settings import DataConfig, VideoConfig
from megatron_keye.errors import UserError
from megatron_keye.pictures import draw_frames, draw_recall, frame_shares, frames, selections

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot.py"
PNG = b"\x89PNG"


def log(folder: Path, measured: bool = True) -> Path:
    rows: list[dict] = [{"iteration": step, "lm loss": 1.0} for step in range(1, 31)]
    for row in rows[9::10] if measured else []:
        share = row["iteration"] / 40
        row |= {"dsa/recall-mass": share, "dsa/recall-set": share / 2, "dsa/recall-chance": 0.2}
        row |= {"dsa/recall-mass-by-layer": [share, share / 2, share / 3]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_recall_is_drawn_by_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "recall", str(log(tmp_path))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recall.png").read_bytes().startswith(PNG)


def test_nothing_measured_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no dsa/recall-mass; .* logging.dsa_health_interval"):
        draw_recall(log(tmp_path, measured=False), tmp_path / "recall.png")
    with pytest.raises(UserError, match=r"recall.jpx: cannot be written"):
        draw_recall(log(tmp_path), tmp_path / "recall.jpx")


def test_frames_are_runs_of_video_tokens():
    ids = torch.tensor([1, 9, 9, 2, 9, 9, 9, 3, 9])
    assert frames(ids, 9).tolist() == [-1, 0, 0, -1, 1, 1, 1, -1, 2]


def test_shares_of_frames_by_hand():
    frame_of = torch.tensor([-1, 0, 0, -1, 1, 1, 1, -1])
    selected = torch.tensor([[[1, 1, 0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0, 1]]]).bool()
    assert frame_shares(selected, frame_of)[0].tolist() == [
        pytest.approx([0.5, 0.0]),
        pytest.approx([1.0, 2 / 3]),
    ]


def test_selection_of_a_real_clip(tokenizer, make_clip, tmp_path):
    settings = DataConfig(tokenizer="-", seq_length=512, video=VideoConfig(min_frame_tokens=4, max_frame_tokens=6))
    content = [{"type": "video", "video": "clip"}, {"type": "text", "text": "What is it?"}]
    inputs = Processor(tokenizer, settings).prompt([{"role": "user", "content": content}], {"clip": make_clip(24)})
    model = m.build_model(m.build_config("keye_mini", attention_mode="sparse", topk=20)).eval()
    frame_of = frames(inputs["input_ids"][0], model.cfg.video_token_id)
    assert int(frame_of.max()) + 1 == len(inputs["grid_thw"])
    behind = int(torch.nonzero(frame_of >= 0)[-1]) + 1
    chosen = selections(model, inputs, behind)
    assert chosen.shape == (4, len(frame_of) - behind, len(frame_of))
    assert (chosen.sum(-1) == 20).all()
    assert not chosen.triu(behind + 1).any()  # nothing that comes later
    draw_frames(model, inputs, tmp_path / "frames.png")
    assert (tmp_path / "frames.png").read_bytes().startswith(PNG)
    dense = m.build_model(m.build_config("keye_mini")).eval()
    with pytest.raises(UserError, match="attention_mode = 'dense' selects nothing"):
        draw_frames(dense, inputs, tmp_path / "frames.png")
