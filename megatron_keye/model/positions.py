"""3-axis rotary positions: (time, height, width), each axis turning its own share of the frequencies.

Angles are computed once a forward, for attention heads (D wide) and indexer heads (Di wide) together, and travel through
the layers as one tensor. Shapes: b rows, s local tokens.
"""

from __future__ import annotations

import torch

from megatron_keye.config.model import ModelConfig
from megatron_keye.config.rope import indexer_sections, mrope_sections


def rotary_angles(cfg: ModelConfig, position_ids: torch.Tensor) -> torch.Tensor:
    """[3, b, s] ids -> [s, b, (D + Di) / 2] angles in fp32: the attention's first, then the indexer's, if there is one."""
    parts = [_axis_angles(cfg, position_ids, cfg.head_dim, mrope_sections(cfg))]
    if cfg.indexer_heads:
        parts.append(_axis_angles(cfg, position_ids, cfg.indexer_head_dim, indexer_sections(cfg)))
    return torch.cat(parts, dim=-1).transpose(0, 1).contiguous()


def axis_of_frequency(sections: list[int], layout: str) -> list[int]:
    """Which axis (0 t, 1 h, 2 w) turns each frequency."""
    if layout == "chunked":
        return [axis for axis, width in enumerate(sections) for _ in range(width)]
    axes = [0] * sum(sections)  # interleaved: t h w t h w ..., and t again once h and w have used up theirs
    for axis in (1, 2):
        for i in range(sections[axis]):
            axes[3 * i + axis] = axis
    return axes


def inverse_frequencies(theta: float, dim: int, device: torch.device) -> torch.Tensor:
    """fp32 [dim / 2], rounded as transformers and the serving engines do: at position 262,143 another last bit is 0.008 rad."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _axis_angles(cfg: ModelConfig, position_ids: torch.Tensor, dim: int, sections: list[int]) -> torch.Tensor:
    device = position_ids.device
    inverse = inverse_frequencies(cfg.rope_theta, dim, device)
    axes = torch.tensor(axis_of_frequency(sections, cfg.mrope_layout), device=device)
    return position_ids.float()[axes].permute(1, 2, 0) * inverse  # [b, s, dim / 2]


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate-half of [s, b, heads, dim] by [s, b, dim / 2], in fp32."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
