"""From a decoder's frame to pixels: colour, orientation, size. The same for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData

# How rows and columns map to the display: the signs of the display matrix (a, b, c, d) -> (transpose, flip rows, flip columns).
Orientation = tuple[bool, bool, bool]
UPRIGHT: Orientation = (False, False, False)
CHUNK = 64  # frames decoded and resized before the next are begun
CHUNK_BYTES = 256 << 20  # of such frames at their own size
BT709 = 1  # as colour spaces are numbered in H.273


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3] by the matrix the stream names (BT.601 where it names none), not yet turned."""
    return frame.reformat(format="rgb24", threads=1).to_ndarray()


def orientation(frame: av.VideoFrame) -> Orientation:
    """How the frame is to be turned for display: multiples of 90 degrees and mirrors, from the container's matrix."""
    data: Any = next((d for d in list[Any](frame.side_data) if d.type == SideData.DISPLAYMATRIX), None)
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    # A source pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    down, across = (b, c) if transpose else (d, a)  # what y and x of the display follow
    return transpose, down < 0, across < 0


def turn(pixels: np.ndarray, how: Orientation) -> np.ndarray:
    """Applies an orientation to [..., H, W, 3]."""
    transpose, rows, columns = how
    if transpose:
        pixels = pixels.swapaxes(-3, -2)
    if rows:
        pixels = pixels[..., ::-1, :, :]
    if columns:
        pixels = pixels[..., ::-1, :]
    return pixels


def resize(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [F, H, W, 3] -> uint8 [F, *size, 3], bicubic with antialias; size (height, width), None keeps it."""
    if size is None or pixels.shape[1:3] == tuple(size):
        return np.ascontiguousarray(pixels)
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(0, 3, 1, 2)
    tensor = torch.nn.functional.interpolate(tensor, size=tuple(size), mode="bicubic", antialias=True)
    return tensor.permute(0, 2, 3, 1).contiguous().numpy()


def chunks(wanted: np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    """`wanted` in pieces of at most CHUNK frames that hold at most CHUNK_BYTES at their own size, or one frame."""
    step = min(CHUNK, max(1, CHUNK_BYTES // (height * width * 3)))
    for at in range(0, len(wanted), step):
        yield wanted[at : at + step]
