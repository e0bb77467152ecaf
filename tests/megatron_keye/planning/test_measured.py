"""The planner's memory against what a real training step allocates: one process, the allocator's own record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keye_data.sample import Batch
from megatron_keye.config.load import load_recipe
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.estimate import estimate, survey_stages
from megatron_keye.planning.hardware import H200
from megatron_keye.planning.measure import Measured, measure_step
from megatron_keye.planning.stages import build_stages, stage_bytes
from megatron_keye.planning.survey import planned_batch

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20
# Six layers, so that the planner's step from one and two layers to all of them is a step; 600 MB and more in all.
# What runs on this machine is planned, where the planner would plan for a GPU: torch's attention, experts in turn.
SIZES = [
    *("profile=mini", "training.init_from=null", "model.attention_backend=torch", "model.num_layers=6"),
    "model.grouped_experts=false",
    *("model.hidden_size=192", "model.moe_ffn_hidden_size=192", "model.vocab_size=24000"),
    *("model.image_token_id=23998", "model.video_token_id=23999", "data.seq_length=1024"),
    *("model.vision_layers=4", "model.vision_hidden_size=96", "data.video.total_tokens=512", "data.image.max_tokens=64"),
    *("training.vision_chunk_patches=1024", "training.micro_batch_size=1", "training.global_batch_size=2"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()
    yield
    shut_down()


def with_pixels(batch: Batch) -> Batch:
    """The planner's batch, its pixels and text made real."""
    batch.patches = torch.randint(0, 255, batch.patches.shape, dtype=torch.uint8)
    batch.input_ids = torch.where(
        batch.input_ids == 0, torch.randint(0, 20_000, batch.input_ids.shape), batch.input_ids
    )
    return batch


def measured(recipe: Recipe) -> Measured:
    return measure_step(recipe, [with_pixels(planned_batch(recipe)) for _ in range(recipe.training.global_batch_size)])


def planned(recipe: Recipe) -> tuple[dict[str, int], str]:
    """Bytes by kind, and the phase of the step with the peak."""
    stages = build_stages(recipe)
    found = estimate(recipe, 1, stages, H200, survey_stages(recipe, 1))
    return {**stage_bytes(stages[0], recipe, 1), "activations": sum(found.stages[0].values())}, found.peak_in[0]


VISION = [
    *("data.video.max_frame_tokens=256", "data.video.total_tokens=768", "training.vision_chunk_patches=4096"),
    *("model.vision_layers=8", "model.vision_ffn_hidden_size=512"),
]


@pytest.mark.slow  # a real step of 500 MB and more each, under the profiler
@pytest.mark.parametrize(
    "recipe, overrides, leading",
    [
        ("stage1", ["training.recompute=none"], "language"),
        ("stage1", ["training.recompute=none", "model.grouped_experts=true"], "language"),
        ("stage1", ["training.recompute=full", "training.precision=bf16", "data.seq_length=2048"], "language"),
        ("stage1", ["training.recompute=full", *VISION], "vision backward"),
        ("dsa_sparse", ["training.recompute=none", "model.topk=128"], "language"),
    ],
    ids=["dense", "grouped experts", "full recomputation in bf16", "pictures lead", "sparse"],
)
def test_memory_is_within_a_tenth_of_the_allocators(recipe, overrides, leading):
    chosen = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*SIZES, *overrides])
    (expected, peak_in), found = planned(chosen), measured(chosen)
    assert peak_in == leading
    pixels = planned_batch(chosen).patches.numel() * chosen.training.global_batch_size  # made before the record began
    real = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "activations": found.peak + pixels - found.weights - found.gradients - found.optimizer,
    }
    print({k: f"{expected[k] / MIB:.1f} planned, {real[k] / MIB:.1f} MiB measured" for k in real})
    assert sum(real.values()) > 500e6
    for kind, size in real.items():
        assert expected[kind] == pytest.approx(size, rel=0.1), kind
    # what the objects own is what the allocator says is alive, so nothing else of size is
    assert found.alive == pytest.approx(found.weights + found.gradients + found.optimizer, rel=0.05)
