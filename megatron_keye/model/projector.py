"""The projector (`mlp_AR`): 2 x 2 neighbouring patches become one token of the language model's width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_keye.model.norms import LayerNorm
from megatron_keye.model.transformer_config import KeyeTransformerConfig


class Projector(MegatronModule):
    def __init__(self, config: KeyeTransformerConfig):
        super().__init__(config=config)
        keye = config.keye
        merged = keye.vision_hidden_size * keye.merge_size**2
        make = dict(dtype=config.params_dtype, device=torch.cuda.current_device())
        self.pre_norm = LayerNorm(config, merged, eps=keye.projector_norm_eps)
        self.linear_1 = nn.Linear(merged, merged, **make)
        self.linear_2 = nn.Linear(merged, keye.hidden_size, **make)

    def forward(self, features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """features [P, vision hidden], grid [N, 2] -> [P / 4, hidden]"""
        x = self.pre_norm(merge(features, grid, self.config.keye.merge_size))
        return self.linear_2(F.gelu(self.linear_1(x)))


def merge(features: torch.Tensor, grid: torch.Tensor, size: int) -> torch.Tensor:
    """Neighbours side by side, row offset outermost: [P, h] -> [P / size^2, size^2 * h]"""
    frames = features.split(grid.prod(-1).tolist())
    merged = [
        x.view(height // size, size, width // size, size, -1).transpose(1, 2).reshape(-1, size * size * x.shape[-1])
        for x, (height, width) in zip(frames, grid.tolist())
    ]
    return torch.cat(merged)


def merged_tokens(grid: torch.Tensor, size: int = 2) -> torch.Tensor:
    """Tokens of each frame after merging, int64 [N]."""
    return grid.prod(-1) // size**2
