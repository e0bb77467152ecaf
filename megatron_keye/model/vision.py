"""The vision encoder: a SigLIP-so400m transformer at native resolution.

Every picture or frame attends to itself alone. Learned 27 x 27 positions are interpolated to its grid, and each layer
turns queries and keys by 2D rotary angles. Shapes: P patches of all frames of a call, N frames, h = hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megatron_keye.model.norms import LayerNorm
from megatron_keye.model.positions import inverse_frequencies
from megatron_keye.model.transformer_config import KeyeTransformerConfig


class FrameAttention(MegatronModule):
    """Full attention inside each frame. Frames of equal length are computed as one batch."""

    def __init__(self, config: KeyeTransformerConfig, layer_number: int, *_, **__):
        super().__init__(config=config)

    def forward(self, query, key, value, attention_mask, *_, **__):
        """query, key, value [P, 1, heads, D]; attention_mask: patches of each frame, int64 [N] -> [P, 1, heads * D]"""
        lengths = attention_mask.tolist()
        frames = [torch.cat([x[:, 0] for x in (query, key, value)], -1).split(lengths)]
        dim = query.shape[-1]
        out: list[torch.Tensor | None] = [None] * len(lengths)
        for length in dict.fromkeys(lengths):
            same = [i for i, n in enumerate(lengths) if n == length]
            qkv = torch.stack([frames[0][i] for i in same]).transpose(1, 2)  # [n, heads, length, 3 D]
            result = F.scaled_dot_product_attention(*qkv.split(dim, dim=-1)).transpose(1, 2)
            for i, y in zip(same, result):
                out[i] = y
        return torch.cat(out).flatten(1)[:, None]


def layer_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=FrameAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class VisionEncoder(MegatronModule):
    def __init__(self, config: KeyeTransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config=config)
        keye = config.keye
        make = dict(dtype=config.params_dtype, device=torch.cuda.current_device())
        side = keye.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, side, stride=side, **make)
        self.position_embedding = nn.Embedding(keye.vision_position_grid**2, config.hidden_size, **make)
        # Released with the model and never read by it; kept so that a conversion loses nothing.
        self.packing_position_embedding = nn.Embedding(keye.vision_packing_positions, config.hidden_size, **make)
        self.packing_position_embedding.weight.requires_grad_(False)
        self.encoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[layer_spec()] * config.num_layers, layer_norm=LayerNorm),
            pg_collection=groups,
        )

    def forward(self, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """patches [P, 3, 14, 14] normalised, raster order; grid int64 [N, 2] patches down, across -> [P, h]"""
        weight = self.patch_embedding.weight
        x = F.linear(patches.flatten(1).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        x = x + self.positions(grid).to(x.dtype)
        angles = self.rotary(grid).to(x.device)[:, None, None]  # the host plans with the grid, and may hold it
        x = self.encoder(hidden_states=x[:, None], attention_mask=grid.prod(-1), rotary_pos_emb=angles)
        return x[:, 0]

    def positions(self, grid: torch.Tensor) -> torch.Tensor:
        """The learned positions, bilinearly interpolated to each frame's grid -> [P, h] in fp32"""
        side = self.config.keye.vision_position_grid
        table = self.position_embedding.weight.float().T.reshape(1, -1, side, side)
        sizes = [tuple(g) for g in grid.tolist()]
        resized = {
            size: F.interpolate(table, size=size, mode="bilinear", align_corners=False).flatten(2)[0].T
            for size in dict.fromkeys(sizes)
        }
        return torch.cat([resized[size] for size in sizes])

    def rotary(self, grid: torch.Tensor) -> torch.Tensor:
        """Angles of concat(row, column), twice over for rotate-half -> [P, D]"""
        cfg = self.config
        dim = cfg.kv_channels // 2  # of one axis, both halves
        inverse = inverse_frequencies(cfg.keye.vision_rope_theta, dim, grid.device)
        parts = []
        for height, width in grid.tolist():
            rows = torch.arange(height, device=grid.device).repeat_interleave(width)
            columns = torch.arange(width, device=grid.device).repeat(height)
            parts.append(torch.stack([rows, columns], -1))
        angles = (torch.cat(parts).float()[..., None] * inverse).flatten(1)
        return torch.cat([angles, angles], -1)
