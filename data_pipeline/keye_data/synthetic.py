"""Generated clips and pictures whose answer is visible only in their pixels.

    python -m keye_data.synthetic --out DIR --count 300 --seed 0 --split train

A coloured square appears on a noisy background at some second and stays. The question asks for its colour or for that second; the
answer is one word or digit. Answers are balanced, so that the best constant answer is right once in as many classes. Positions, sizes,
backgrounds and noise come from a generator seeded by (seed, split, number): training and held-out samples never share one.
DIR receives conversations.jsonl and the media it names, ready for tools/build_shards.py. 300 clips take about two seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from keye_data.errors import DataError

COLOURS = {"red": (210, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (225, 205, 40)}
QUESTIONS = {"colour": "What colour is the square?", "time": "At which second does it appear?"}
SPLITS = {"train": 0, "heldout": 1}
CODECS = {
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}),
    "h264": ("libx264", "mp4", {"preset": "ultrafast", "crf": "18"}),
}


def generate(
    out: str | Path,
    count: int,
    seed: int = 0,
    split: str = "train",
    kind: str = "clips",
    questions: tuple[str, ...] | None = None,
    size: int = 56,
    frames: int = 4,
    fps: int = 1,
    codec: str = "vp9",
    blank: bool = False,
) -> Path:
    """Writes `count` samples to the new folder `out`; returns its conversations.jsonl.

    `kind` is "clips" (`frames` frames at `fps`, `size` x `size` pixels) or "pictures" (PNG, colour only). `questions` are asked in
    turn. `blank` leaves the square out and keeps questions and answers: what a model scores on those it did not learn from pixels.
    DataError for a choice that does not exist and for a folder that already holds something.
    """
    questions = questions or (("colour", "time") if kind == "clips" else ("colour",))
    _check(out := Path(out), count, split, kind, questions, size, frames, fps, codec)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "samples"
        (folder / kind).mkdir(parents=True)
        plans = _plans(count, [seed, SPLITS[split]], questions, range(0, frames, fps))
        with (folder / "conversations.jsonl").open("w") as lines:
            for i, (question, colour, start) in enumerate(plans):
                rng = np.random.default_rng([seed, SPLITS[split], i])
                pixels = draw(
                    rng, colour, start if kind == "clips" else 0, size, frames if kind == "clips" else 1, blank
                )
                name = f"{kind}/{i:06}.{'png' if kind == 'pictures' else CODECS[codec][1]}"
                (folder / name).write_bytes(_png(pixels[0]) if kind == "pictures" else encode(pixels, fps, codec))
                answer = colour if question == "colour" else str(start // fps)
                lines.write(json.dumps(_sample(f"{split}-{seed}-{i:06}", name, question, answer)) + "\n")
        if out.exists():
            out.rmdir()
        folder.replace(out)
    return out / "conversations.jsonl"


def draw(rng: np.random.Generator, colour: str, start: int, size: int, frames: int, blank: bool = False) -> np.ndarray:
    """uint8 [frames, size, size, 3]: a square of `colour` from frame `start` on."""
    pixels = np.full((frames, size, size, 3), rng.integers(70, 170), np.float32)
    top, bottom = rng.uniform(-25, 25, 2).tolist()
    pixels += rng.integers(-15, 16, 3) + np.linspace(top, bottom, size)[:, None]  # a tint, and light from one end
    side = int(rng.integers(size * 3 // 10, size * 6 // 10 + 1))
    y, x = rng.integers(0, size - side + 1, 2)
    square = np.array(COLOURS[colour]) + rng.integers(-20, 21, 3)
    if not blank:
        pixels[start:, y : y + side, x : x + side] = square
    pixels += rng.normal(0, rng.uniform(2, 10), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, fps: int, codec: str = "vp9") -> bytes:
    """A clip of uint8 [F, H, W, 3]."""
    name, container, options = CODECS[codec]
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream(name, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for i, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def _plans(count: int, seed: list[int], questions: tuple[str, ...], starts: range) -> list[tuple[str, str, int]]:
    """(question, colour, first frame) of each sample: every combination equally often, shuffled."""
    every = [(q, c, s) for s in starts for c in COLOURS for q in questions]
    # A whole round of combinations is balanced; the rest of the last round is balanced per question as far as it goes.
    order = [every[i % len(every)] for i in range(count)]
    return [order[i] for i in np.random.default_rng(seed).permutation(count)]


def _sample(key: str, media: str, question: str, answer: str) -> dict[str, Any]:
    kind = "image" if media.endswith(".png") else "video"
    content = [{"type": kind, kind: media}, {"type": "text", "text": QUESTIONS[question]}]
    return {"id": key, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _check(
    out: Path,
    count: int,
    split: str,
    kind: str,
    questions: tuple[str, ...],
    size: int,
    frames: int,
    fps: int,
    codec: str,
) -> None:
    choices = (
        ("split", split, SPLITS),
        ("kind", kind, ("clips", "pictures")),
        ("codec", codec, CODECS),
        *(("question", question, QUESTIONS) for question in questions),
    )
    for name, value, known in choices:
        if value not in known:
            raise DataError(f"{name} {value!r} is none of {', '.join(known)}")
    if kind == "pictures" and "time" in questions:
        raise DataError("question 'time' needs kind 'clips'")
    if count < 1 or size < 16 or size % 2 or frames < 1 or fps < 1:
        raise DataError(f"count {count}, size {size}, frames {frames}, fps {fps}: at least 1, 16 (even), 1, 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: it exists already; remove it or choose another folder")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--count", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--split", default="train", choices=list(SPLITS))
    parser.add_argument("--kind", default="clips", choices=["clips", "pictures"])
    parser.add_argument(
        "--question", action="append", choices=list(QUESTIONS), help="may be repeated; both if left out"
    )
    parser.add_argument("--size", type=int, default=56, metavar="PIXELS")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--fps", type=int, default=1)
    parser.add_argument("--codec", default="vp9", choices=list(CODECS))
    parser.add_argument("--blank", action="store_true", help="leave the square out, keep questions and answers")
    options = vars(parser.parse_args(arguments))
    try:
        path = generate(questions=tuple(options.pop("question") or ()) or None, **options)
    except (DataError, OSError) as error:
        print(f"synthetic: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {options['count']} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
