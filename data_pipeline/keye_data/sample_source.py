"""The fetched originals -> a small source folder of conversations: videos.jsonl, pictures.jsonl, text.jsonl.

What the answers say is known of the file (which film, how long) or measured in its frames (brightness, cuts, the main colour).
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keye_data import video
from keye_data.errors import DataError
from keye_data.images import decode_image
from keye_data.synthetic import encode

BUNNY, TRAILER = "the animated film Big Buck Bunny", "the trailer of the animated film Big Buck Bunny"
FILMS = {
    "bunny.mp4": BUNNY,
    "bunny_trailer.mp4": TRAILER,
    "bunny_sample.mp4": BUNNY,
    "gnome_monitors.webm": "a screen recording of the GNOME desktop, about arranging two monitors",
}
COPIES = {
    "bunny.mp4": 8,
    "bunny_trailer.mp4": 3,
    "bunny_sample.mp4": 1,
    "gnome_monitors.webm": 5,
}  # packets as they are
SMALL = {"bunny.mp4": 20, "bunny_trailer.mp4": 4}  # scaled down, VP9
SMALL_SIZE, SMALL_SECONDS = (180, 320), 5.0
SECONDS = (4.0, 10.0)  # of a copy
PICTURES = {
    "astronaut.png": (
        "An astronaut in an orange space suit smiles before a flag and a model of the space shuttle.",
        "orange",
    ),
    "rocket.jpg": ("A white rocket stands on its launch pad at dusk, lit by lamps.", "dark blue"),
    "hubble_deep_field.jpg": ("Many small, distant galaxies shine before black space.", "black"),
    "coffee.png": ("A cup of espresso stands on a red saucer with a spoon, on a wooden table.", "red and brown"),
    "chelsea.png": ("The face of a tabby cat with yellow-green eyes.", "brown"),
    "camera.png": ("A man in a dark coat looks through a camera on a tripod, in black and white.", "grey"),
    "retina.jpg": ("The retina of an eye with its blood vessels, seen through a medical camera.", "red"),
    "horse.png": ("The black silhouette of a horse on a white background.", "black and white"),
    "grass.png": ("A texture of grass, in black and white.", "grey"),
    "gravel.png": ("A texture of small stones, in black and white.", "grey"),
    "brick.png": ("A wall of bricks, in black and white.", "grey"),
    "china.jpg": ("A Chinese pagoda with green and red roofs stands among trees above a lake.", "green and red"),
    "flower.jpg": ("An orange dahlia in bloom before dark green leaves.", "orange"),
}
ASK_CAPTION = ("Describe the picture.", "What does the picture show?", "What can be seen here?", "Give a caption.")
HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 55,
    "green": 110,
    "turquoise": 175,
    "blue": 220,
    "purple": 280,
    "red again": 360,
}
PARAGRAPHS = (400, 1600)  # characters of a text sample


def lay_out(originals: Path, out: Path) -> dict[str, int]:
    """Writes the source folder `out`, whole or not at all, and returns the samples per kind. Skips a folder that is there."""
    kinds = {"videos": _videos, "pictures": _pictures, "text": _texts}
    if not out.exists():
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary) / "source"
            folder.mkdir()
            for kind, records in kinds.items():
                lines = [json.dumps(record, ensure_ascii=False) for record in records(originals, folder)]
                if not lines:
                    raise DataError(f"{originals}: it holds nothing to make {kind} of; remove it and fetch again")
                (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            os.replace(folder, out)
    return {kind: len((out / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()) for kind in kinds}


def _videos(originals: Path, out: Path) -> Iterator[dict[str, Any]]:
    (out / "clips").mkdir()
    number = 0
    for name, film in FILMS.items():
        path = originals / name
        if not path.exists():  # the Debian package is optional
            continue
        clips = [*_copies(path, COPIES[name]), *_small(path, SMALL.get(name, 0))]
        for i, (data, suffix) in enumerate(clips):
            clip = f"clips/{path.stem}_{i}{suffix}"
            (out / clip).write_bytes(data)
            for turns in _questions(data, film, number):
                yield _conversation(f"{path.stem}_{i}_{number % 2}", "video", clip, turns)
                number += 1


def _copies(path: Path, count: int) -> Iterator[tuple[bytes, str]]:
    """Excerpts from one clean start to another, spread over the film, packets copied."""
    table = video.scan(path)
    times = np.sort(table.pts[table.frames]) * float(table.time_base)
    starts = np.searchsorted(np.sort(table.pts[table.frames]), table.pts[table.sync])
    spans: list[tuple[int, int]] = []
    edges = [*starts.tolist(), len(times)]
    for a in edges[:-1]:
        ends = [b for b in edges if b > a and SECONDS[0] <= times[b - 1] - times[a] <= SECONDS[1]]
        if ends and (not spans or a >= spans[-1][1]):
            spans.append((a, ends[0]))
    for i in np.unique(np.linspace(0, len(spans) - 1, min(count, len(spans))).round().astype(int)):
        yield video.trim(path, range(*spans[i]), table)[0], path.suffix


def _small(path: Path, count: int) -> Iterator[tuple[bytes, str]]:
    """Short excerpts at half the frame rate, scaled down and encoded anew: DALI decodes VP9 on a CPU too."""
    times = video.probe(path).timestamps if count else np.empty(0)
    for middle in (np.arange(count) + 0.5) / max(count, 1) * (times[-1] if count else 0):
        frames = np.flatnonzero(np.abs(times - middle) <= SMALL_SECONDS / 2)[::2]
        fps = round((len(frames) - 1) / (times[frames[-1]] - times[frames[0]]))
        yield encode(video.decode(path, frames, size=SMALL_SIZE), fps, "vp9"), ".webm"


def _questions(data: bytes, film: str, number: int) -> list[list[tuple[str, str]]]:
    """Two conversations about a clip, each a list of (question, answer)."""
    info = video.probe(data)
    frames = video.decode(data, range(info.n_frames), size=(36, 64)).astype(np.float32)  # [F, 36, 64, 3]
    seconds = f"{info.duration:.0f}"
    facts = [
        ("What is this clip from?", f"It is from {film}."),
        ("How many seconds does the clip last?", seconds),
        ("Is the end of the clip brighter or darker than its beginning?", _brightness(frames)),
        ("Which colour is most common?", _main_colour(frames).capitalize() + "."),
    ]
    described = f"This is {seconds} seconds of {film}."
    cut = _cut(frames, info.timestamps)
    if cut == 0:
        facts.append(("Is there a cut in the clip?", "No."))
        described += " It is a single shot."
    elif cut is not None:
        facts.append(("Is there a cut in the clip?", f"Yes, at second {cut:.1f}."))
        described += f" There is a cut at second {cut:.1f}."
    turned = facts[number % len(facts) :] + facts[: number % len(facts)]
    return [turned[:3], [("Describe the clip.", described), turned[3]]]


def _brightness(frames: np.ndarray) -> str:
    change = float(frames[-3:].mean() - frames[:3].mean())
    return "About the same." if abs(change) < 6 else ("Brighter." if change > 0 else "Darker.")


def _cut(frames: np.ndarray, times: np.ndarray) -> float | None:
    """The second of the hardest cut, a change far above those around it; 0 for a clip without; None where it is not clear."""
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    if change.max() < 12:
        return 0.0
    return float(times[1 + change.argmax()]) if change.max() > max(25, 5 * np.median(change)) else None


def _main_colour(frames: np.ndarray) -> str:
    """The word for most pixels of [F, H, W, 3] in 0..255."""
    pixels = frames.reshape(-1, 3) / 255
    high, low, peak = pixels.max(1), pixels.min(1), pixels.argmax(1)
    spread = np.maximum(high - low, 1e-6)
    rows = np.arange(len(pixels))
    hue = (60 * (2 * peak + (pixels[rows, (peak + 1) % 3] - pixels[rows, (peak + 2) % 3]) / spread)) % 360
    words = np.array([word.split()[0] for word in HUES], dtype=object)
    named = words[np.abs(hue[:, None] - list(HUES.values())).argmin(1)]
    named[(named == "orange") & (high < 0.7)] = "brown"
    named[spread < 0.08] = "grey"
    named[(spread < 0.08) & (low > 0.8)] = "white"
    named[high < 0.16] = "black"
    found, counts = np.unique(named.astype(str), return_counts=True)
    return str(found[counts.argmax()])


def _pictures(originals: Path, out: Path) -> Iterator[dict[str, Any]]:
    (out / "images").mkdir()
    for number, (name, (caption, colour)) in enumerate(PICTURES.items()):
        pixels = decode_image((originals / name).read_bytes())
        height, width, _ = pixels.shape
        middle = pixels[height // 8 : height - height // 8, width // 8 : width - width // 8]
        for i, (crop, side) in enumerate(((pixels, 336), (pixels, 196), (middle, 280))):
            image = f"images/{Path(name).stem}_{i}.jpg"
            picture = Image.fromarray(crop)
            picture.thumbnail((side, side), Image.Resampling.BICUBIC)
            saved = io.BytesIO()
            picture.save(saved, "JPEG", quality=90)
            (out / image).write_bytes(saved.getvalue())
            turns = [(ASK_CAPTION[(number + i) % len(ASK_CAPTION)], caption)]
            if i == 1:
                turns.append(("Which colours stand out?", colour.capitalize() + "."))
            yield _conversation(f"{Path(name).stem}_{i}", "image", image, turns)


def _texts(originals: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Prose of the packages' documentation, some paragraphs a sample."""
    for path in sorted((originals / "text").rglob("*.rst")):
        samples: list[str] = [""]
        for paragraph in _prose(path.read_text(encoding="utf-8", errors="replace")):
            if len(samples[-1]) + len(paragraph) > PARAGRAPHS[1]:
                samples.append("")
            samples[-1] = f"{samples[-1]}\n\n{paragraph}".strip()
        for i, text in enumerate(samples):
            if len(text) >= PARAGRAPHS[0]:
                yield {"id": f"{path.parent.name}_{path.stem}_{i}", "text": text}


def _prose(rst: str) -> Iterator[str]:
    """Paragraphs without directives, tables, headings and markup."""
    for block in re.split(r"\n\s*\n", rst):
        if block.startswith((" ", "\t", "..", ":", "=", "-", "*", "+", "|")) or re.search(
            r"^[=~\-^#*\"`]{3,}$", block, re.M
        ):
            continue
        text = re.sub(r":[\w:]+:`~?([^`<]*?)\s*(<[^`]*>)?`", r"\1", block)
        text = re.sub(r"`+([^`<]*?)\s*(<[^`]*>)?`+_*", r"\1", text)
        text = re.sub(r"\s+", " ", text.replace("**", "")).strip()
        if len(text.split()) >= 8:
            yield text.removesuffix(":") + ":" if text.endswith("::") else text


def _conversation(key: str, kind: str, media: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for i, (question, answer) in enumerate(turns):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": question if i else [{"type": kind, kind: media}, text]})
        messages.append({"role": "assistant", "content": answer})
    return {"id": key, "messages": messages}
