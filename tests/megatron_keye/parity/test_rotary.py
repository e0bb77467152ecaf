"""Rotary positions against transformers: Qwen2.5-VL's chunked sections, Qwen3-VL's interleaved ones, PaddleOCR-VL's 2D.

The same: frequencies, which axis turns which frequency, rotate-half, everything in fp32. So the comparison is of bits: both
sides do the same operations in the same order, and an angle of position 262,143 would show another rounding by 0.008 rad.
Gradients too: the way back is the same products.
Not the same: Qwen3-VL's text model rotates in the dtype of the activations, we always in fp32 (as Qwen2.5-VL's vision does).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.model.positions import rotary_angles, rotate
from tests.megatron_keye.parity.compare import generator

THETA = 1e7


def chunked(head_dim: int, sections: list[int]):
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": sections}
    config = Qwen2_5_VLTextConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope)
    return qwen25.Qwen2_5_VLRotaryEmbedding(config), qwen25.apply_rotary_pos_emb


def interleaved(head_dim: int, sections: list[int]):
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": sections}
    config = Qwen3VLTextConfig(head_dim=head_dim, rope_parameters=rope)
    return qwen3.Qwen3VLTextRotaryEmbedding(config), qwen3.apply_rotary_pos_emb


# layout: (theirs, sections at head_dim 128, sections of the indexer's 64)
LAYOUTS = {
    "chunked": (chunked, [16, 24, 24], [8, 12, 12]),
    "interleaved": (interleaved, [24, 20, 20], [12, 10, 10]),
}


def full_size(layout: str) -> ModelConfig:
    return build_config("keye_vl2_30b_a3b", mrope_layout=layout)


def positions(tokens: int = 50, rows: int = 2) -> Tensor:
    """[3, rows, tokens]: the three axes far from each other, up to the greatest position there is."""
    ids = torch.randint(0, 262_144, (3, rows, tokens), generator=generator(0))
    ids[:, 0, -1] = 262_143
    return ids


def rotated(x: Tensor, turn) -> tuple[Tensor, Tensor]:
    """-> turn(x), and the gradient of x under a fixed random one of the result"""
    leaf = x.clone().requires_grad_()
    y = turn(leaf)
    y.backward(torch.randn(y.shape, generator=generator(9)))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("part", ["attention", "indexer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_of_rotated_heads(layout: str, part: str):
    make, sections, indexer_sections = LAYOUTS[layout]
    cfg, ids = full_size(layout), positions()
    dim = cfg.head_dim if part == "attention" else cfg.indexer_head_dim
    embedding, apply = make(dim, sections if part == "attention" else indexer_sections)
    x = torch.randn(2, 50, 3, dim, generator=generator(1))  # [b, s, heads, D]
    cos, sin = embedding(x, ids)
    theirs = rotated(x, lambda q: apply(q, q, cos, sin, unsqueeze_dim=2)[0])
    both = rotary_angles(cfg, ids).split([cfg.head_dim // 2, cfg.indexer_head_dim // 2], dim=-1)
    angles = both[0 if part == "attention" else 1]
    ours = rotated(x, lambda q: rotate(q.transpose(0, 1), angles).transpose(0, 1))
    for got, want in zip(ours, theirs):
        assert torch.equal(got, want)


def test_the_layouts_differ_and_the_comparison_notices():
    """The wrong layout, and two axes exchanged."""
    ids = positions()
    cos, _ = interleaved(128, [24, 20, 20])[0](torch.zeros(1), ids)
    sections = [24, 20, 20]
    as_chunks = build_config("keye_vl2_30b_a3b", mrope_layout="chunked", mrope_section=sections, indexer_heads=0)
    for cfg, its_ids in ((as_chunks, ids), (full_size("interleaved"), ids[[0, 2, 1]])):
        angles = rotary_angles(cfg, its_ids)[..., :64].transpose(0, 1)
        assert not torch.allclose(angles.cos(), cos[..., :64], atol=0.1)


def test_text_alone_is_plain_rotary_in_both_layouts():
    """Equal ids on the three axes: the layout cannot matter, so that a text model's weights serve either."""
    ids = positions()[:1].expand(3, -1, -1)
    one, other = (rotary_angles(full_size(layout), ids) for layout in LAYOUTS)
    assert torch.equal(one, other)
