"""How large a picture may be, and how many frames of a clip are taken and how large.

Pure functions. Sizes are (height, width) in pixels, multiples of FACTOR; one token covers FACTOR x FACTOR pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from keye_data.settings import VideoConfig

FACTOR = 28  # pixels of one token's side: 14-pixel patches, merged 2 x 2
MAX_ASPECT_RATIO = 200
NOISE = 1e-9  # so that a side of exactly 8 tokens is not floored to 7 or ceiled to 9 by rounding
# Containers round timestamps (WebM to a millisecond), so a clip of 10 s may measure 9.999 s: it still gives 20 frames.
FRAME_COUNT_SLACK = 0.01
ADAPTIVE_SHARES = ((256.0, 0.125), (512.0, 0.25), (1024.0, 0.5))  # up to so many seconds: this share of the budget


class TooSmallBudget(ValueError):
    """Not even one frame fits."""


@dataclass(frozen=True)
class FramePlan:
    indices: list[int]  # frames of the clip, ascending
    size: tuple[int, int]  # of every frame

    @property
    def tokens(self) -> int:
        return len(self.indices) * tokens_of(self.size)


def tokens_of(size: tuple[int, int]) -> int:
    return (size[0] // FACTOR) * (size[1] // FACTOR)


def smart_resize(height: int, width: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of 28, nearly the same shape, within the token limits.

    Each side is rounded to the nearest multiple. Too large an area is scaled by sqrt(area / maximum) and floored, too small a
    one scaled up and ceiled. Where both limits cannot hold the maximum does. ValueError for an aspect ratio above 200.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"a picture of {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width} x {height} pixels: the aspect ratio is above {MAX_ASPECT_RATIO}")
    rows, columns = max(1, round(height / FACTOR)), max(1, round(width / FACTOR))
    area = height * width / FACTOR**2
    if rows * columns < min_tokens:
        scale = math.sqrt(min_tokens / area) / FACTOR
        rows, columns = math.ceil(height * scale - NOISE), math.ceil(width * scale - NOISE)
    if rows * columns > max_tokens:
        scale = math.sqrt(max_tokens / area) / FACTOR
        rows, columns = max(1, math.floor(height * scale + NOISE)), max(1, math.floor(width * scale + NOISE))
        # a side held up at one token makes the other too long
        rows, columns = min(rows, max_tokens // columns or 1), min(columns, max_tokens // rows or 1)
    return rows * FACTOR, columns * FACTOR


def video_budget(duration: float, settings: VideoConfig, videos: int = 1) -> int:
    """Tokens that one of `videos` clips of a sample may take: an equal part of the total, less for a short clip."""
    share = 1.0
    if settings.adaptive_budget:
        share = next((s for limit, s in ADAPTIVE_SHARES if duration <= limit), 1.0)
    return int(settings.total_tokens * share / videos)


def plan_frames(
    n_frames: int,
    duration: float,
    height: int,
    width: int,
    settings: VideoConfig,
    *,
    budget: int,
    room: int | None = None,
    marker_tokens: int = 0,
) -> FramePlan:
    """Which frames of a clip to take, and how large.

    nframes = min(max(int(duration * fps), 2), budget / min_frame_tokens, max_frames, n_frames); indices by rounded
    linspace; then the most tokens per frame, by bisection, that keeps the clip within `budget` vision tokens.
    `room`, where given, also limits vision tokens plus `marker_tokens` per frame (timestamp, start, end).
    Raises TooSmallBudget when not one frame fits.
    """
    low, high = settings.min_frame_tokens, settings.max_frame_tokens
    count = max(int(duration * settings.fps + FRAME_COUNT_SLACK), 2)
    count = min(count, budget // low, settings.max_frames, n_frames)
    if room is not None:
        count = min(count, room // (low + marker_tokens))
        budget = min(budget, room - count * marker_tokens)
    if count < 1:
        raise TooSmallBudget(f"no frame of {low} tokens fits into the {budget if room is None else room} left for it")

    def size(limit: int) -> tuple[int, int]:
        return smart_resize(height, width, settings.min_frame_tokens, limit)

    while low < high:  # the greatest limit that fits; `low` always does, since count * min_frame_tokens <= budget
        middle = (low + high + 1) // 2
        if count * tokens_of(size(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return FramePlan(np.linspace(0, n_frames - 1, count).round().astype(int).tolist(), size(low))
