"""One attention layer in dense mode against transformers' Qwen3MoeAttention (eager): values and gradients.

Both get normalised hidden states; ours key ranges, theirs an additive mask. Text positions restart in every document. The
layer is also fed three different position axes, with the cosines of Qwen2.5-VL and Qwen3-VL on their side: so is the
attention of a multimodal model. fp32, relative norms by tensor, bound 5e-6 (measured 6e-7): sums in another order.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding

import megatron_keye.model as m
from keye_kernels.dsa.reference import range_mask
from megatron_keye.model.attention import KeyeSelfAttention
from megatron_keye.model.names import load_released
from megatron_keye.model.positions import rotary_angles
from tests.megatron_keye.parity import qwen
from tests.megatron_keye.parity.compare import assert_near, error, generator, released_gradients
from tests.megatron_keye.parity.test_dense_attention import packed
from tests.megatron_keye.parity.test_language import indexers
from tests.megatron_keye.parity.test_rotary import LAYOUTS

TOLERANCE = 5e-6
DOCUMENTS = {"causal": [70], "packed": [30, 1, 25, 14]}
PREFIX = "model.layers.0.self_attn."


def config(layout: str = "chunked") -> m.ModelConfig:
    return m.build_config(
        "keye_mini", num_layers=1, vocab_size=256, image_token_id=254, video_token_id=255, num_attention_heads=8,
        head_dim=128, indexer_head_dim=64, mrope_layout=layout,
    )  # fmt: skip


def models(layout: str = "chunked") -> tuple[m.KeyeModel, Qwen3MoeAttention]:
    cfg = config(layout)
    theirs = qwen.oracle(cfg)
    ours = m.build_model(cfg)
    load_released(ours.language_model, cfg, (qwen.released(theirs) | indexers(cfg)).__getitem__)
    return ours, theirs.model.layers[0].self_attn


def text_positions(lengths: list[int]) -> Tensor:
    """[3, 1, T]"""
    return torch.cat([torch.arange(n) for n in lengths]).expand(3, 1, -1)


def run(forward, weights) -> dict[str, Tensor]:
    """forward of hidden states [1, T, h] -> the output, the gradient of the hidden states, and those of all weights"""
    hidden = torch.randn(1, 70, config().hidden_size, generator=generator(1)).requires_grad_()
    out = forward(hidden)
    out.backward(torch.randn(out.shape, generator=generator(2)))
    assert hidden.grad is not None
    return {"output": out.detach(), "hidden": hidden.grad, **weights()}


def ours_of(model: m.KeyeModel, lengths: list[int], position_ids: Tensor) -> dict[str, Tensor]:
    layer = model.language_model.decoder.layers[0].self_attention
    assert isinstance(layer, KeyeSelfAttention)
    ranges = torch.stack([x[None] for x in packed(*lengths)])
    angles = rotary_angles(model.cfg, position_ids)
    return run(
        lambda x: layer(x.transpose(0, 1), ranges, rotary_pos_emb=angles)[0].transpose(0, 1),
        lambda: released_gradients([model.language_model], model.cfg),
    )


def theirs_of(layer: Qwen3MoeAttention, lengths: list[int], cos_sin: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    visible = range_mask(*packed(*lengths), sum(lengths))
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
    return run(lambda x: layer(x, cos_sin, mask)[0], lambda: {PREFIX + n: p.grad for n, p in layer.named_parameters()})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_text(name: str):
    lengths = DOCUMENTS[name]
    ours, theirs = models()
    ids = text_positions(lengths)
    cos_sin = Qwen3MoeRotaryEmbedding(theirs.config)(torch.zeros(1), ids[0])
    want = theirs_of(theirs, lengths, cos_sin)
    assert len(want) == 2 + 6  # four matrices, two norms
    assert_near(ours_of(ours, lengths, ids), want, TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_axes(layout: str):
    make, sections, _ = LAYOUTS[layout]
    ours, theirs = models(layout)
    ids = torch.randint(0, 5000, (3, 1, 70), generator=generator(3))
    cos_sin = make(128, sections)[0](torch.zeros(1), ids)
    want = theirs_of(theirs, [70], cos_sin)
    assert_near(ours_of(ours, [70], ids), want, TOLERANCE)
    other = theirs_of(theirs, [70], make(128, sections)[0](torch.zeros(1), ids[[1, 0, 2]]))
    assert error(other["output"], want["output"]) > 1e-2  # the axes matter


def test_two_query_heads_exchanged_are_noticed():
    """Heads of two groups: each attends the other's keys. Within a group, o_proj tells them apart."""
    for a, b in ((0, 4), (0, 1)):
        ours, theirs = models()
        ids = text_positions([70])
        got = ours_of(ours, [70], ids)
        with torch.no_grad():
            heads = theirs.q_proj.weight.view(8, 128, -1)
            heads[[a, b]] = heads[[b, a]]
        cos_sin = Qwen3MoeRotaryEmbedding(theirs.config)(torch.zeros(1), ids[0])
        assert error(got["output"], theirs_of(theirs, [70], cos_sin)["output"]) > 1e-2
