"""Resize rule and frame plan against cases worked by hand, and their invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from keye_data.budget import TooSmallBudget, plan_frames, smart_resize, tokens_of, video_budget
from keye_data.settings import VideoConfig


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "want"),
    [
        (280, 560, 4, 20480, (280, 560)),  # already right
        (290, 300, 4, 20480, (280, 308)),  # 10.36, 10.71 -> 10, 11
        (720, 1280, 64, 256, (336, 588)),  # scale sqrt(256 * 784 / 921600): 12.0 and 21.33 -> floored 12, 21
        (720, 1280, 64, 64, (168, 280)),  # 6.0 and 10.67
        (28, 28, 4, 20480, (56, 56)),  # up to 4 tokens
        (100, 100, 64, 256, (224, 224)),  # 8.0 exactly, not 9
        (30, 90, 4, 100, (56, 112)),  # 1.15 and 3.46 -> ceiled 2, 4
        (20, 4000, 1, 64, (28, 1792)),  # one row; the other side held at the maximum
    ],
)
def test_smart_resize(height, width, low, high, want):
    assert smart_resize(height, width, low, high) == want


def test_smart_resize_keeps_the_limits():
    sides = [1, 13, 27, 28, 29, 97, 224, 480, 1023, 3000]
    for height, width, (low, high) in itertools.product(sides, sides, [(4, 64), (64, 256), (4, 20480), (64, 64)]):
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(height, width, low, high)
            continue
        size = smart_resize(height, width, low, high)
        assert size[0] % 28 == 0 and size[1] % 28 == 0
        assert 1 <= tokens_of(size) <= high
        if high >= 4 * low and max(height, width) <= 2 * min(height, width):  # else flooring may go below the minimum
            assert tokens_of(size) >= low


def test_two_hours_become_2880_frames_of_64_tokens():
    settings = VideoConfig()
    budget = video_budget(7200.0, settings)
    assert budget == 184_320
    plan = plan_frames(172_800, 7200.0, 448, 448, settings, budget=budget)
    assert len(plan.indices) == 2880 and plan.size == (224, 224) and plan.tokens == 184_320
    assert plan.indices[0] == 0 and plan.indices[-1] == 172_799


def test_adaptive_budget_and_sharing():
    settings = VideoConfig()
    assert [video_budget(s, settings) for s in (10, 256, 256.1, 512, 1024, 1024.1)] == [
        23_040,
        23_040,
        46_080,
        46_080,
        92_160,
        184_320,
    ]
    assert video_budget(10.0, settings, videos=3) == 7_680
    assert video_budget(10.0, VideoConfig(adaptive_budget=False)) == 184_320


def test_short_clip_takes_two_frames_a_second():
    settings = VideoConfig()
    plan = plan_frames(240, 10.0, 720, 1280, settings, budget=23_040)
    assert len(plan.indices) == 20
    assert plan.indices == np.linspace(0, 239, 20).round().astype(int).tolist()
    assert plan.size == (336, 588)  # 252 tokens, limited by max_frame_tokens
    # the same clip in WebM, whose times are rounded to milliseconds
    assert len(plan_frames(240, 9.9997, 720, 1280, settings, budget=23_040).indices) == 20


def test_frame_count_limits():
    settings = VideoConfig()
    assert plan_frames(1, 0.0, 448, 448, settings, budget=1000).indices == [0]
    assert plan_frames(30, 0.5, 448, 448, settings, budget=1000).indices == [0, 29]  # at least two
    assert len(plan_frames(9, 60.0, 448, 448, settings, budget=10_000).indices) == 9  # no frame twice
    assert len(plan_frames(999, 60.0, 448, 448, settings, budget=640).indices) == 10  # budget / min_frame_tokens
    assert len(plan_frames(999, 60.0, 448, 448, VideoConfig(max_frames=7), budget=10_000).indices) == 7


def test_tokens_per_frame_shrink_under_the_budget():
    # 10 frames, 1000 tokens: the greatest square under 100 tokens a frame is 10 x 10
    plan = plan_frames(100, 5.0, 1000, 1000, VideoConfig(), budget=1000)
    assert len(plan.indices) == 10 and plan.size == (280, 280)
    # 9 tokens less and only 9 x 9 fits
    assert plan_frames(100, 5.0, 1000, 1000, VideoConfig(), budget=999).size == (252, 252)


def test_room_counts_the_markers():
    plan = plan_frames(100, 5.0, 1000, 1000, VideoConfig(), budget=10_000, room=1060, marker_tokens=6)
    assert plan.size == (280, 280) and len(plan.indices) == 10
    with pytest.raises(TooSmallBudget):
        plan_frames(100, 5.0, 1000, 1000, VideoConfig(), budget=10_000, room=69, marker_tokens=6)
    assert len(plan_frames(100, 5.0, 1000, 1000, VideoConfig(), budget=10_000, room=70, marker_tokens=6).indices) == 1


def test_plan_never_exceeds_budget_or_room():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n_frames, height, width = int(rng.integers(1, 5000)), int(rng.integers(16, 2000)), int(rng.integers(16, 2000))
        budget, room, marker = int(rng.integers(64, 30_000)), int(rng.integers(80, 30_000)), int(rng.integers(2, 9))
        plan = plan_frames(
            n_frames, n_frames / 24, height, width, VideoConfig(), budget=budget, room=room, marker_tokens=marker
        )
        assert plan.tokens <= budget and plan.tokens + marker * len(plan.indices) <= room
        assert plan.indices == sorted(set(plan.indices)) and plan.indices[0] >= 0 and plan.indices[-1] < n_frames
