"""What four times the frames add to a step's peak: pixels, embeddings and the embeddings' gradients, and nothing else.

Peaks are the allocator's own record of every allocation (planning/measure.py), so temporaries inside operators count.
"""

from __future__ import annotations

import pytest
import torch

from keye_data.sample import IGNORE, Batch
from megatron_keye.config.model import build_config
from megatron_keye.config.recipe import Recipe
from megatron_keye.planning.measure import measure_step

LENGTH, SIDE, HIDDEN = 1536, 8, 512  # tokens of a row, patches along a frame's side, width of the language model
TOKENS = SIDE * SIDE // 4
FEW, MANY = 16, 64
PIXELS, FP32 = SIDE * SIDE * 3 * 14 * 14, 4


def batch(recipe: Recipe, frames: int) -> Batch:
    ids = torch.arange(LENGTH)[None] % 250
    ids[:, : frames * TOKENS] = recipe.model.image_token_id
    targets = torch.full_like(ids, IGNORE)
    targets[:, -16:] = 1
    stop = torch.arange(1, LENGTH + 1, dtype=torch.int32)[None]
    return Batch(
        input_ids=ids,
        targets=targets,
        position_ids=torch.arange(LENGTH).expand(3, 1, LENGTH).contiguous(),
        key_start=torch.zeros_like(stop),
        key_stop=stop,
        patches=torch.zeros(frames * SIDE * SIDE, 3, 14, 14, dtype=torch.uint8),
        grid=torch.full((frames, 2), SIDE),
    )


def peak(frames: int, chunk_patches: int, scope: str) -> int:
    """Bytes alive at the peak of a step, the batch's pixels included."""
    recipe = Recipe()
    recipe.model = build_config(
        "keye_mini",
        **dict(num_layers=1, hidden_size=HIDDEN, vocab_size=256, image_token_id=254, video_token_id=255),
        **dict(vision_layers=4, vision_hidden_size=128, vision_heads=4, vision_ffn_hidden_size=512),
    )
    recipe.training.precision, recipe.training.scope = "fp32", scope
    recipe.training.vision_chunk_patches = chunk_patches
    return measure_step(recipe, [batch(recipe, frames)]).activations + frames * PIXELS


def growth(chunk_patches: int, scope: str = "all_but_indexers") -> float:
    """Of the peak from FEW to MANY frames, over that of pixels, embeddings and gradients."""
    allowed = (MANY - FEW) * (PIXELS + 2 * TOKENS * HIDDEN * FP32)
    return (peak(MANY, chunk_patches, scope) - peak(FEW, chunk_patches, scope)) / allowed


def test_four_times_the_frames():
    assert growth(chunk_patches=4 * SIDE * SIDE) == pytest.approx(1.0, abs=0.05)


def test_without_chunks_it_would_be_seen():
    """All frames in one chunk: the encoder's activations grow with them, and the measure above must notice."""
    assert growth(chunk_patches=MANY * SIDE * SIDE) > 1.5
