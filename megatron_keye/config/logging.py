"""The `logging` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoggingConfig:
    interval: int = 1  # steps between lines
    wandb: str = "offline"  # offline | online | off
    wandb_project: str = "megatron_keye"
    plot: bool = True  # loss.png
    # steps between measurements of the indexers, and at the last step; None = never
    dsa_health_interval: int | None = 50
