"""From a picture or the frames of a clip to patches: the one way in which pixels are made, wherever that happens.

Shapes: P patches of 14 x 14 pixels, N pictures and frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from keye_data.budget import FACTOR
from keye_data.errors import DataError
from keye_data.images import decode_image
from keye_data.sample import Media
from keye_data.settings import VideoConfig
from keye_data.stretch import UNREADABLE, content
from keye_data.video import UnsupportedCodec, decode_chunks

PATCH = FACTOR // 2
BROKEN = {"image": "undecodable picture", "video": "corrupt clip"}


def media_grid(media: Media) -> torch.Tensor:
    """int64 [N, 2]: patches down and across, one row per picture or frame."""
    return torch.tensor([[media.size[0] // PATCH, media.size[1] // PATCH]]).repeat(media.n_frames, 1)


def decode_pixels(media: Media, how: VideoConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes and resizes: uint8 [P, 3, 14, 14] in raster order inside a frame, and int64 grid [N, 2] in patches.

    Part by part and chunk by chunk: of the film and of frames at their own size little is in memory at a time. DataError.
    """
    grid = media_grid(media)
    patches = torch.empty(int(grid.prod(1).sum()), 3, PATCH, PATCH, dtype=torch.uint8)
    at = 0
    with broken(media.kind, f"a {media.kind}", decoding=True):
        for frames in _frames(media, how):
            if frames.shape[1:] != (*media.size, 3):
                raise DataError(f"decoded to {list(frames.shape[1:])}, not {[*media.size, 3]}")
            tiles = _tiles(torch.as_tensor(frames))
            if at + len(tiles) > len(patches):
                raise DataError(f"gives more than its {len(grid)} frames")
            patches[at : at + len(tiles)] = tiles
            at += len(tiles)
        if at != len(patches):
            raise DataError(f"gives fewer than its {len(grid)} frames")
    return patches, grid


def _frames(media: Media, how: VideoConfig) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], in chunks."""
    for part in media.parts:
        if media.kind == "image":
            yield decode_image(content(part.data), size=media.size)[None]
            continue
        device = None if how.device == "auto" else how.device
        yield from decode_chunks(part.data, np.asarray(part.frames), how.backend, media.size, device=device)


def _tiles(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [f, H, W, 3] -> [f x H/14 x W/14, 3, 14, 14]."""
    count, height, width, _ = frames.shape
    tiles = frames.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return tiles.reshape(-1, 3, PATCH, PATCH)


@contextmanager
def broken(kind: str, name: str, decoding: bool = False) -> Iterator[None]:
    """Whatever a decoder says about a broken file becomes one DataError that names it."""
    try:
        yield
    except UnsupportedCodec as error:
        if decoding:
            raise  # the clip was readable: data.video.backend is the wrong choice, and no sample is at fault
        raise DataError(f"{name}: {error}", "unsupported codec") from error
    except DataError as error:
        if error.reason == "too long":
            raise
        if error.reason in (UNREADABLE, "missing media"):  # not the file's fault, but its shard's
            raise DataError(f"{name}: {error}", error.reason) from error
        raise DataError(f"{name}: {error}", BROKEN[kind]) from error
    except (ValueError, IndexError, OSError, RuntimeError, EOFError) as error:
        raise DataError(f"{name}: {type(error).__name__}: {error}", BROKEN[kind]) from error
