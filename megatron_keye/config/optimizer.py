"""The `optimizer` section: AdamW through Megatron's distributed optimizer, and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    lr: float = 1e-4
    min_lr: float = 0.0
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup_steps: int = 0
    decay_steps: int | None = None  # cosine: length (None = all steps); wsd: the last so many steps (None = a tenth)
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    vision_lr_scale: float = 1.0
    offload_fraction: float = 0.0  # share of the moments and master weights that lives, and is updated, on the CPU
