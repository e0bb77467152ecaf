"""Packed rows of random documents and pictures for tests of layouts: made in memory, the same on every rank."""

from __future__ import annotations

import numpy as np
import torch

from keye_data.packing import collate
from keye_data.positions import mrope_positions
from keye_data.sample import IGNORE, Batch, EncodedSample
from megatron_keye.config.model import ModelConfig
from megatron_keye.parallel.plan import Plan

GRIDS = [(2, 2), (4, 2), (2, 4), (4, 4)]  # patches down, across


def random_sample(cfg: ModelConfig, length: int, pictures: int, rng: np.random.Generator, clips: int = 0):
    """A document of `length` tokens with pictures inside -> (sample, grids); the second half is to be predicted.

    The last `clips` of the pictures are clips of two frames, with a token for the time between them.
    """
    ids = rng.integers(0, cfg.image_token_id, size=length)
    grids, at = [], 1
    for picture in range(pictures):
        down, across = GRIDS[rng.integers(len(GRIDS))]
        tokens = down * across // 4
        kind, frames = (cfg.video_token_id, 2) if picture >= pictures - clips else (cfg.image_token_id, 1)
        if at + frames * (tokens + 1) >= length:
            break
        for _ in range(frames):
            ids[at : at + tokens] = kind
            grids.append((1, down, across))
            at += tokens + 1
        at += 1
    labels = ids.copy()
    labels[: length // 2] = IGNORE
    positions = mrope_positions(ids, np.array(grids).reshape(-1, 3), cfg.image_token_id, cfg.video_token_id)
    return EncodedSample("synthetic", "synthetic", ids, labels, positions), grids


def step_batches(
    cfg: ModelConfig, plan: Plan, step: int, *, rows=8, seq_length=64, micro_batch=2, most_pictures=2, clips=0, bare=0
) -> list[Batch]:
    """This block's micro-batches of global step `step`: rows are dealt to data ranks in order. The last `bare` are text."""
    packed = random_rows(cfg, step, rows, seq_length, most_pictures, clips, bare)
    mine = packed[plan.data_rank * rows // plan.data_size : (plan.data_rank + 1) * rows // plan.data_size]
    return [to_batch(mine[i : i + micro_batch], seq_length) for i in range(0, len(mine), micro_batch)]


def random_rows(cfg: ModelConfig, step: int, rows: int, seq_length: int, most_pictures: int, clips=0, bare=0) -> list:
    """-> for each row (samples, grids, pixels): up to three documents, the last part of the row is padding."""
    rng = np.random.default_rng(step)
    packed = []
    for row in range(rows):
        samples, grids, used = [], [], 0
        for _ in range(3):
            length = int(rng.integers(8, seq_length // 2))
            if used + length > seq_length - 3:
                break
            pictures = int(rng.integers(0, most_pictures + 1)) if row < rows - bare else 0
            sample, its_grids = random_sample(cfg, length, pictures, rng, clips)
            samples.append(sample)
            grids += its_grids
            used += length
        packed.append((samples, grids, rng.integers(0, 256, size=(sum(g[1] * g[2] for g in grids), 3, 14, 14))))
    return packed


def to_batch(packed: list, seq_length: int) -> Batch:
    rows = collate([samples for samples, _, _ in packed], seq_length, pad_id=0)
    grids = [g[1:] for _, its_grids, _ in packed for g in its_grids]
    return Batch(
        **{
            n: torch.from_numpy(getattr(rows, n))
            for n in ["input_ids", "targets", "position_ids", "key_start", "key_stop"]
        },
        patches=torch.from_numpy(np.concatenate([p for _, _, p in packed]).astype(np.uint8)),
        grid=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
    )
