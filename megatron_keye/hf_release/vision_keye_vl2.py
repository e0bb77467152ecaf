"""Keye-VL-2.0's eyes: a SigLIP-so400m encoder at native resolution and the projector, one picture or frame at a time.

Shapes: one picture or frame of height x width patches, P = height * width; `hidden` is the encoder's width.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_keye_vl2 import LayerNorm, rotate


class VisionEmbeddings(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.side = vision.image_size // vision.patch_size
        self.patch_embedding = nn.Conv2d(3, vision.hidden_size, vision.patch_size, stride=vision.patch_size)
        self.position_embedding = nn.Embedding(self.side**2, vision.hidden_size)
        # Released with the model and never read by it.
        self.packing_position_embedding = nn.Embedding(vision.packing_positions, vision.hidden_size)

    def forward(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """pixels [P, 3, 14, 14] -> [P, hidden]: patches plus the learned positions, interpolated to this size."""
        table = self.position_embedding.weight.float().T.reshape(1, -1, self.side, self.side)
        positions = F.interpolate(table, (height, width), mode="bilinear", align_corners=False)
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(1)
        return patches + positions[0].flatten(1).T.to(patches.dtype)


class VisionAttention(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.heads = vision.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(vision.hidden_size, vision.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Full attention inside one picture: x [P, hidden], angles [P, D / 2] -> [P, hidden]"""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        logits = torch.einsum("thd,shd->hts", q, k).float() * q.shape[-1] ** -0.5
        return self.out_proj(torch.einsum("hts,shd->thd", logits.softmax(-1).to(v.dtype), v).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.fc2 = nn.Linear(vision.intermediate_size, vision.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.self_attn = VisionAttention(vision)
        self.layer_norm2 = LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.mlp = VisionMLP(vision)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), angles)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_hidden_layers))


class VisionTransformer(nn.Module):
    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.vision = vision
        self.embeddings = VisionEmbeddings(vision)
        self.encoder = VisionEncoder(vision)
        self.post_layernorm = LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """One picture, pixels [P, 3, 14, 14] in raster order -> [P, hidden]"""
        x = self.embeddings(pixels, height, width)
        angles = self.angles(height, width).to(x.device)
        for layer in self.encoder.layers:
            x = layer(x, angles)
        return self.post_layernorm(x)

    def angles(self, height: int, width: int) -> Tensor:
        """Half of the frequencies turn by the row, half by the column -> [P, D / 2] in fp32"""
        axis = self.vision.hidden_size // self.vision.num_attention_heads // 2
        inverse = 1.0 / self.vision.rope_theta ** (torch.arange(0, axis, 2, dtype=torch.float32) / axis)
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.cat([row.flatten()[:, None] * inverse, column.flatten()[:, None] * inverse], dim=-1)


class KeyeVL2Vision(nn.Module):
    """The released checkpoint names the encoder visual.vision_model."""

    def __init__(self, vision: SimpleNamespace) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(vision)


class KeyeVL2Projector(nn.Module):
    """2 x 2 neighbouring patches become one token of the language model's width."""

    def __init__(self, vision: SimpleNamespace, width: int) -> None:
        super().__init__()
        self.merge = vision.spatial_merge_size
        merged = vision.hidden_size * self.merge**2
        self.pre_norm = LayerNorm(merged, eps=vision.projector_norm_eps)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, width)

    def forward(self, features: Tensor, height: int, width: int) -> Tensor:
        """features [P, hidden] of one picture -> [P / 4, width of the language model]"""
        x = features.view(height // self.merge, self.merge, width // self.merge, self.merge, -1)
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # row offset outside column offset
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(x))))
