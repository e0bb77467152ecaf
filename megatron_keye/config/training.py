"""The `training` section: how long, how much, in what precision, and what learns."""

from __future__ import annotations

from dataclasses import dataclass

SCOPES = ("all", "all_but_indexers", "projector", "indexers")


@dataclass
class TrainingConfig:
    steps: int = 1000
    micro_batch_size: int = 1  # packed rows per forward
    global_batch_size: int = 8  # packed rows per step, over all data-parallel ranks
    seed: int = 1234
    precision: str = "bf16"  # bf16 (fp32 master weights) | fp32
    scope: str = "all_but_indexers"  # all | all_but_indexers | projector | indexers
    # a checkpoint folder (newest iteration) or a Hugging Face folder; None = random weights
    init_from: str | None = None
    # on the head-averaged KL; Kwai's sum over G KV groups is G times this; weight not published
    indexer_loss_weight: float = 1.0
    # least top-k recall (share of dense attention's mass, mean over layers) of the warm-up that init_from names; None = any
    recall_gate: float | None = None
    # what of a layer is computed again in backward: none | selective (core attention) | moe (experts) | full (all of it)
    recompute: str = "none"
    vision_chunk_patches: int = 16_384  # ViT activations held at once; the ViT is always computed again in backward
    balance: bool = True  # deal frames to ranks and packed rows to data-parallel blocks by cost; false: as they come
    max_nonfinite_steps: int = 10  # skipped in a row before the run stops
    collective_timeout_minutes: float = 10.0  # a collective that waits longer ends the job: parallel/watchdog.py
    stop_after: int | None = None  # leave after this step of the schedule, with a checkpoint (for trials of resume)
