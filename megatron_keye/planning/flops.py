"""Floating-point work of a step, from the shapes that ran: what the throughput in the log is made of.

A multiply-add counts as two. Backward counts twice the forward, for what has a gradient to carry.
"""

from __future__ import annotations

import torch

from keye_data.sample import IGNORE, Batch
from megatron_keye.config.model import ModelConfig


def language_forward(cfg: ModelConfig, tokens: int, pairs: int, selected_pairs: int, predicted: int) -> float:
    """`pairs` of query and visible key; `selected_pairs` of those that attention sums over."""
    width = cfg.num_attention_heads * cfg.head_dim
    kv = cfg.num_query_groups * cfg.head_dim
    projections = cfg.hidden_size * (2 * width + 2 * kv)
    experts = cfg.experts_per_token * 3 * cfg.hidden_size * cfg.moe_ffn_hidden_size
    router = cfg.hidden_size * cfg.num_experts
    per_layer = 2.0 * tokens * (projections + experts + router)
    per_layer += 4.0 * width * (pairs if cfg.attention_mode != "sparse" else selected_pairs)
    if cfg.attention_mode != "dense":
        indexer_rows = cfg.indexer_heads * (cfg.indexer_head_dim + 1) + cfg.indexer_head_dim
        per_layer += 2.0 * tokens * cfg.hidden_size * indexer_rows
        per_layer += 2.0 * cfg.indexer_heads * cfg.indexer_head_dim * pairs
    return cfg.num_layers * per_layer + 2.0 * predicted * cfg.hidden_size * cfg.vocab_size


def vision_forward(cfg: ModelConfig, grid: torch.Tensor) -> float:
    """Encoder and projector over frames of `grid` int64 [N, 2] patches."""
    n = grid.prod(-1).double()
    h, merged = cfg.vision_hidden_size, cfg.vision_hidden_size * cfg.merge_size**2
    matrices = 2.0 * (4 * h * h + 2 * h * cfg.vision_ffn_hidden_size)
    encoder = cfg.vision_layers * (matrices * n + 4.0 * h * n * n)
    embedding = 2.0 * 3 * cfg.patch_size**2 * h * n
    projector = 2.0 * (merged * merged + merged * cfg.hidden_size) * n / cfg.merge_size**2
    return float((encoder + embedding + projector).sum())


def step_flops(cfg: ModelConfig, batches: list[Batch]) -> float:
    """Forward and backward of one block's micro-batches."""
    total = 0.0
    for batch in batches:
        visible = batch.key_stop - batch.key_start
        total += language_forward(
            cfg,
            tokens=int((visible > 0).sum()),
            pairs=int(visible.sum()),
            selected_pairs=int(visible.clamp(max=cfg.topk).sum()),
            predicted=int((batch.targets != IGNORE).sum()),
        )
        total += vision_forward(cfg, batch.grid)
    return 3.0 * total
