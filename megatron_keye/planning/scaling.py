"""The 30B model at 256K on 64 to 4,096 GPUs, and how far the model of time is off where runs are published.

python -m megatron_keye.planning.scaling          # both tables, in Markdown
"""

from __future__ import annotations

from dataclasses import replace

import megatron_keye.parallel  # noqa: F401  (first: it makes Megatron-Core usable without CUDA)
from megatron_keye.config.data import DataConfig
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.training import TrainingConfig
from megatron_keye.planning.anchors import ANCHORS, PUBLISHED_KERNELS, fitted, predicted_seconds
from megatron_keye.planning.dry_run import make_plan
from megatron_keye.planning.hardware import GIB, H200

LENGTH = 262_144
ROWS = 512  # of a step: 134 M tokens
LAYOUT = ParallelConfig(tensor=4, context=8, expert=16)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def recipe_at_256k(mode: str) -> Recipe:
    """Every part trains; half of a row is video. mode: "dense" | "sparse"."""
    data = DataConfig(seq_length=LENGTH)
    data = replace(data, video=replace(data.video, total_tokens=LENGTH // 2, max_frame_tokens=256))
    scope = "all" if mode == "sparse" else "all_but_indexers"
    training = TrainingConfig(global_batch_size=ROWS, recompute="full", scope=scope)
    return Recipe(
        name=f"256K, {mode}", model=ModelConfig(attention_mode=mode), parallel=LAYOUT, data=data, training=training
    )


def scaling_table() -> str:
    """Rows of a fixed batch spread over more and more GPUs."""
    lines = [
        "| attention | GPUs | rows a GPU block | s/step | tokens/s/GPU | MFU | exchange | gradients | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode in ("dense", "sparse"):
        recipe = recipe_at_256k(mode)
        for gpus in SIZES:
            plan = make_plan(recipe, gpus, H200)
            step, seconds = plan["step"], plan["step"]["seconds"]
            share = {kind: f"{seconds[kind] / seconds['total']:.0%}" for kind in ("exchange", "gradients")}
            lines.append(
                f"| {mode} | {gpus:,} | {plan['recipe']['micro_batches_per_step']} | {seconds['total']:.1f} | "
                f"{step['tokens_per_second_and_gpu']:,.0f} | {step['mfu']:.1%} | {share['exchange']} | "
                f"{share['gradients']} | {max(s['bytes']['sum'] for s in plan['stages']) / GIB:.1f} |"
            )
    return "\n".join(lines)


def anchor_table() -> str:
    """Published seconds a step against predicted: with rates fitted to the first row, and with nothing hidden."""
    machine = fitted()
    lines = [
        f"| run on 16 H100 | published s/step | fitted (unhidden {machine.unhidden:.2f}) | nothing hidden |",
        "|---|---|---|---|",
    ]
    for anchor in ANCHORS:
        cells = []
        for hw in (machine, PUBLISHED_KERNELS):
            seconds = predicted_seconds(anchor, hw)
            cells.append(f"{seconds:.2f} ({seconds / anchor.seconds:.2f} of it)")
        lines.append(f"| {anchor.name} | {anchor.seconds:.2f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(anchor_table(), scaling_table(), sep="\n\n")
