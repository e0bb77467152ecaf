"""The `checkpoint` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    interval: int | None = 1000  # steps between saves; None = only at the end
    keep: int = 2  # newest complete ones kept; older ones are deleted
    resume: bool = True  # go on from the newest complete checkpoint of run_dir
