"""A contact sheet: pictures and frames of some samples as one PNG, with names and times."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from keye_data.errors import DataError
from keye_data.images import decode_image
from keye_data.shards.inspect import Sample
from keye_data.video import decode
from keye_data.video.stored import StoredClip

COLUMNS = 6  # pictures in a row
CELL = (160, 240)  # pixels: height, width of a picture at most
LINE = 16  # pixels of a line of text
GAP = 6


def contact_sheet(chosen: Iterable[Sample], path: Path) -> int:
    """Writes the PNG: for each sample a title and its pictures, of a clip COLUMNS frames evenly spread. Returns the pictures.

    What cannot be decoded is drawn as its reason.
    """
    rows: list[tuple[str, list[tuple[Image.Image, str]]]] = []
    for sample in chosen:
        cells = [cell for kind, name in dict.fromkeys(sample.media) for cell in _cells(sample, kind, name)]
        rows.append((f"{sample.shard} {sample.key}  {' '.join(sample.text.split())}", cells))
    if not any(cells for _, cells in rows):
        raise DataError(f"{path}: the samples chosen hold neither pictures nor clips to show")
    height = sum(LINE + GAP + -(-len(cells) // COLUMNS) * (CELL[0] + LINE + GAP) for _, cells in rows)
    sheet = Image.new("RGB", (GAP + COLUMNS * (CELL[1] + GAP), GAP + height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    y = GAP
    for title, cells in rows:
        draw.text((GAP, y), _drawable(title)[:150], fill="black", font=font)
        y += LINE + GAP
        for i, (picture, label) in enumerate(cells):
            x = GAP + i % COLUMNS * (CELL[1] + GAP)
            top = y + i // COLUMNS * (CELL[0] + LINE + GAP)
            sheet.paste(picture, (x, top))
            draw.text((x, top + CELL[0]), _drawable(label)[:40], fill="black", font=font)
        y += -(-len(cells) // COLUMNS) * (CELL[0] + LINE + GAP)
    sheet.save(path, "PNG")
    return sum(len(cells) for _, cells in rows)


def _drawable(text: str) -> str:
    """What Pillow's own font has signs for."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _cells(sample: Sample, kind: str, name: str) -> list[tuple[Image.Image, str]]:
    try:
        if kind == "image":
            return [(_small(decode_image(sample.members[name].read())), name)]
        return [(_small(frame), f"{name}  {seconds:.2f} s") for frame, seconds in _frames(sample, name)]
    except KeyError:
        fault = "no such member"
    except (DataError, ValueError, RuntimeError) as error:
        fault = str(error)
    blank = Image.new("RGB", (CELL[1], CELL[0]), "lightgrey")
    ImageDraw.Draw(blank).multiline_text((4, 4), "\n".join(_wrapped(_drawable(fault))), fill="black")
    return [(blank, f"{name}  cannot be shown")]


def _wrapped(text: str) -> list[str]:
    return [text[i : i + 38] for i in range(0, min(len(text), 300), 38)]


def _frames(sample: Sample, name: str) -> list[tuple[np.ndarray, float]]:
    """(pixels [H, W, 3], seconds) of frames spread evenly over a clip."""
    clip = StoredClip(sample.members, name)
    info = clip.info
    indices = spread(info.n_frames)
    frames = [frame for data, inside in clip.cut(indices) for frame in decode(data, inside)]
    return [(frame, float(info.timestamps[i])) for frame, i in zip(frames, indices)]


def spread(count: int) -> list[int]:
    """At most COLUMNS indices below `count`, first and last among them."""
    return np.unique(np.linspace(0, count - 1, COLUMNS).round().astype(int)).tolist()


def _small(pixels: np.ndarray) -> Image.Image:
    return ImageOps.contain(Image.fromarray(pixels), (CELL[1], CELL[0]))
