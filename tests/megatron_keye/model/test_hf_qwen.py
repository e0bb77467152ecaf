"""Plain Qwen3-MoE folders as transformers writes them: the same logits, and back again."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import megatron_keye.model as m
from megatron_keye.errors import UserError
from megatron_keye.model.hf_files import Checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=True, rope_theta=1e6, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("qwen") / "hf"
    model.save_pretrained(folder)
    return model, folder


IDS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_same_logits_and_loss(original):
    theirs, folder = original
    ours = m.from_hf(folder)
    assert ours.visual is None
    assert ours.cfg.attention_mode == "dense"
    assert not [name for name, _ in ours.named_parameters() if "indexer" in name or "visual" in name]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    wanted = theirs(IDS, labels=IDS)
    torch.testing.assert_close(ours(IDS), wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(IDS, labels=IDS), wanted.loss, rtol=1e-5, atol=0)


@torch.no_grad()
def test_back_to_transformers(original, tmp_path):
    theirs, folder = original
    m.to_hf(m.from_hf(folder), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3_moe"
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "hf")
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.names())
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_a_language_model_takes_no_pictures(original):
    with pytest.raises(UserError, match="no vision tower"):
        m.from_hf(original[1])(IDS, pixel_values=torch.zeros(4, 3, 14, 14), grid_thw=torch.tensor([[1, 2, 2]]))
    with pytest.raises(UserError, match="needs indexers"):
        m.from_hf(original[1], attention_mode="sparse")
