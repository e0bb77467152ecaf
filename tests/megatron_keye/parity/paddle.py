"""transformers' PaddleOCR-VL vision tower, eager, as an oracle of ours: the same names behind `visual.`, random weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PaddleOCRVLConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector, PaddleOCRVisionModel

import megatron_keye.model as m
from tests.megatron_keye.parity.compare import generator

UNUSED = "visual.vision_model.embeddings.packing_position_embedding.weight"  # of ours; theirs has none


def config() -> m.ModelConfig:
    """Mini, but with the released head dimension 72: 18 frequencies an axis."""
    return m.build_config("keye_mini", vision_hidden_size=144, vision_heads=2, vision_ffn_hidden_size=200)


def oracles(cfg: m.ModelConfig) -> tuple[PaddleOCRVisionModel, PaddleOCRProjector]:
    vision = dict(
        hidden_size=cfg.vision_hidden_size, intermediate_size=cfg.vision_ffn_hidden_size,
        num_hidden_layers=cfg.vision_layers, num_attention_heads=cfg.vision_heads, patch_size=cfg.patch_size,
        image_size=cfg.vision_position_grid * cfg.patch_size, layer_norm_eps=cfg.vision_layer_norm_eps,
        rope_parameters={"rope_type": "axial", "rope_theta": cfg.vision_rope_theta},
    )  # fmt: skip
    whole = PaddleOCRVLConfig(vision_config=vision, text_config={"hidden_size": cfg.hidden_size})
    whole.vision_config._attn_implementation = "eager"
    return PaddleOCRVisionModel(whole.vision_config), PaddleOCRProjector(whole)


def our_tower(cfg: m.ModelConfig) -> torch.nn.Module:
    """Weights and biases that are all far from their neutral values."""
    tower = m.build_model(cfg, seed=3).visual
    assert tower is not None
    with torch.no_grad():
        for i, (name, p) in enumerate(tower.named_parameters()):
            noise = torch.randn(p.shape, generator=generator(i))
            p.add_(noise * 0.2) if p.dim() == 1 else p.copy_(
                noise * (1.0 if "position" in name else p.shape[-1] ** -0.5)
            )
    return tower


def patches_of(grid: Tensor) -> Tensor:
    """[N, 2] -> [P, 3, 14, 14]"""
    return torch.randn(int(grid.prod(-1).sum()), 3, 14, 14, generator=generator(4))


def with_time(grid: Tensor) -> Tensor:
    """[N, 2] -> [N, 3], one frame each"""
    return torch.cat([torch.ones_like(grid[:, :1]), grid], dim=1)
