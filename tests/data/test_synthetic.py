"""Generated samples: the answer is in the pixels, balanced, and nowhere else."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye_data import synthetic, video
from keye_data.errors import DataError


def read(path: Path) -> list[tuple[Path, str, str]]:
    """(media file, question, answer) of every sample."""
    samples = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [
        (
            path.parent / next(iter(set(user["content"][0].values()) - {"video", "image"})),
            user["content"][1]["text"],
            answer["content"],
        )
        for user, answer in samples
    ]


def seen(frames: np.ndarray) -> tuple[str, int]:
    """The colour of the square and the frame in which it appears, told from pixels [F, H, W, 3]."""
    pixels = frames.astype(int)
    vivid = pixels.max(-1) - pixels.min(-1) > 75
    start = int(np.argmax(vivid.mean((1, 2)) > 0.04))
    mean = pixels[start][vivid[start]].mean(0)
    return min(synthetic.COLOURS, key=lambda name: float(np.abs(mean - synthetic.COLOURS[name]).sum())), start


@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_the_answer_can_be_seen(tmp_path, codec):
    path = synthetic.generate(tmp_path / "a", 48, seed=3, codec=codec)
    for file, question, answer in read(path):
        assert video.probe(file).timestamps.tolist() == [0, 1, 2, 3]
        colour, start = seen(video.decode(file, range(4)))
        assert answer == (colour if "colour" in question else str(start))


def test_half_seconds(tmp_path):
    path = synthetic.generate(tmp_path / "a", 12, frames=6, fps=2, size=84, questions=("time",))
    for file, _, answer in read(path):
        assert video.probe(file).timestamps.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        frames = video.decode(file, range(6))
        assert frames.shape == (6, 84, 84, 3)
        assert seen(frames)[1] == 2 * int(answer)


def test_pictures(tmp_path):
    for file, _, answer in read(synthetic.generate(tmp_path / "a", 20, kind="pictures")):
        assert seen(np.asarray(Image.open(io.BytesIO(file.read_bytes())))[None])[0] == answer


def test_answers_are_balanced(tmp_path):
    for name, questions, classes in (("a", ("colour",), 4), ("b", ("time",), 4), ("c", ("colour", "time"), 8)):
        answers = Counter(answer for _, _, answer in read(synthetic.generate(tmp_path / name, 64, questions=questions)))
        assert set(answers.values()) == {64 // classes}


def test_splits_and_seeds_share_nothing_and_repeat_exactly(tmp_path):
    def media(name: str, **options) -> list[bytes]:
        path = synthetic.generate(tmp_path / name, 30, kind="pictures", **options)
        return [file.read_bytes() for file, _, _ in read(path)]

    train, again = media("a", seed=1), media("b", seed=1)
    held_out, other = media("c", seed=1, split="heldout"), media("d", seed=2)
    assert train == again
    assert len({*train, *held_out, *other}) == 90


def test_blank_keeps_the_questions_and_hides_the_answers(tmp_path):
    plain = read(synthetic.generate(tmp_path / "a", 16, seed=5))
    blank = read(synthetic.generate(tmp_path / "b", 16, seed=5, blank=True))
    assert [sample[1:] for sample in plain] == [sample[1:] for sample in blank]
    for file, _, _ in blank:
        pixels = video.decode(file, range(4)).astype(int)
        assert (pixels.max(-1) - pixels.min(-1) > 75).mean() < 0.01


def test_command_and_its_errors(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "x"), "--count", "2"]
    assert synthetic.main(arguments) == 0
    assert synthetic.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(DataError, match="'test' is none of train, heldout"):
        synthetic.generate(tmp_path / "y", 2, split="test")
    with pytest.raises(DataError, match="needs kind 'clips'"):
        synthetic.generate(tmp_path / "y", 2, kind="pictures", questions=("time",))
    assert not (tmp_path / "y").exists()
