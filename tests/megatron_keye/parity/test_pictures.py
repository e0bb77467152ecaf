"""The language model with pictures inside, dense mode, against transformers' Qwen3-VL-MoE text model (eager).

Both get the same picture embeddings (the tower has oracles of its own), theirs placed by this file, and each its own
positions: ours from keye_data, theirs from Qwen3-VL's get_rope_index. Interleaved sections are theirs as they stand; for the
chunked ones their rotary module is exchanged for Qwen2.5-VL's. DeepStack, which adds pictures again in later layers, is
Qwen3-VL's alone and left out. Logits, loss, gradients of all weights and of the picture embeddings.
fp32, relative norms by tensor, bound 1e-5 (measured 2e-6): sums in another order.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLMoeTextConfig, Qwen3VLMoeTextModel

import megatron_keye.model as m
from keye_data.positions import mrope_positions
from keye_data.sample import IGNORE
from megatron_keye.model.names import load_released
from tests.megatron_keye.parity import qwen
from tests.megatron_keye.parity.compare import assert_near, error, generator, released_gradients
from tests.megatron_keye.parity.test_language import indexers
from tests.megatron_keye.parity.test_mrope_ids import IMAGE, TEXT, VIDEO, row, theirs, tiny
from tests.megatron_keye.parity.test_rotary import LAYOUTS

ROWS = [row(5, (IMAGE, 4, 6), 3, (IMAGE, 2, 8), 17), row((VIDEO, 4, 4), 4, (VIDEO, 4, 4), 23)]


def config(layout: str) -> m.ModelConfig:
    return m.build_config(
        "keye_mini", vocab_size=128, image_token_id=IMAGE, video_token_id=VIDEO, head_dim=128, indexer_head_dim=64,
        mrope_layout=layout,
    )  # fmt: skip


def oracle(cfg: m.ModelConfig) -> Qwen3VLMoeTextModel:
    make, sections, _ = LAYOUTS[cfg.mrope_layout]
    torch.manual_seed(1)
    config = Qwen3VLMoeTextConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, moe_intermediate_size=cfg.moe_ffn_hidden_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_attention_heads, head_dim=cfg.head_dim,
        num_key_value_heads=cfg.num_query_groups, num_experts=cfg.num_experts,
        num_experts_per_tok=cfg.experts_per_token, rms_norm_eps=cfg.rms_norm_eps, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_section": [24, 20, 20]},
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    model = Qwen3VLMoeTextModel(config)
    model.rotary_emb = make(cfg.head_dim, sections)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T], labels aligned with them, picture embeddings [n, h]"""
    ids = torch.tensor([ids for ids, _ in ROWS])
    ids[ids == TEXT] = torch.randint(0, IMAGE, (int((ids == TEXT).sum()),), generator=generator(1))
    is_picture = ids >= IMAGE
    visual = torch.randn(int(is_picture.sum()), config("chunked").hidden_size, generator=generator(2)) * 0.3
    return ids, ids.masked_fill(is_picture, IGNORE), visual


def run_theirs(model: Qwen3VLMoeTextModel, head: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    ids, labels, visual = inputs()
    visual.requires_grad_()
    embedded = model.embed_tokens(ids)
    places = torch.zeros_like(embedded).index_put((ids >= IMAGE).nonzero(as_tuple=True), visual)
    embedded = torch.where((ids >= IMAGE)[..., None], places, embedded)
    logits = model(inputs_embeds=embedded, position_ids=position_ids).last_hidden_state @ head.T
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    loss.backward()
    gradients = {f"model.{n}": g for n, g in qwen.released(model, lambda p: p.grad).items()}
    assert visual.grad is not None and head.grad is not None
    return {"logits": logits, "loss": loss, "visual": visual.grad, "lm_head.weight": head.grad, **gradients}


def run_ours(model: m.KeyeModel) -> dict[str, Tensor]:
    ids, labels, visual = inputs()
    visual.requires_grad_()
    positions = [mrope_positions(row_ids, grids, IMAGE, VIDEO) for row_ids, (_, grids) in zip(ids, ROWS)]
    position_ids = torch.stack([torch.from_numpy(p) for p in positions], dim=1)
    stop = torch.arange(1, ids.shape[1] + 1, dtype=torch.int32).expand(ids.shape)
    ranges = torch.stack([torch.zeros_like(stop), stop])
    with torch.no_grad():
        logits = model.language_model(ids, position_ids, ranges, visual)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    loss = model.language_model(ids, position_ids, ranges, visual, targets).mean()
    loss.backward()
    assert visual.grad is not None
    gradients = released_gradients([model.language_model], model.cfg)
    return {"logits": logits, "loss": loss, "visual": visual.grad, **gradients}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_every_gradient(layout: str):
    cfg = config(layout)
    model = oracle(cfg)
    head = (torch.randn(cfg.vocab_size, cfg.hidden_size, generator=generator(3)) * 0.1).requires_grad_()
    ours = m.build_model(cfg)
    weights = {f"model.{n}": t for n, t in qwen.released(model).items()} | {"lm_head.weight": head.detach()}
    load_released(ours.language_model, cfg, (weights | indexers(cfg)).__getitem__)
    images = [grid for ids, grids in ROWS if IMAGE in ids for grid in grids]
    videos = [(len(grids), *grids[0][1:]) for ids, grids in ROWS if VIDEO in ids]
    position_ids = theirs(tiny(Qwen3VLConfig, Qwen3VLModel), inputs()[0], images=images, videos=videos)
    got, want = run_ours(ours), run_theirs(model, head, position_ids)
    assert_near(got, want, 1e-5)
    model.zero_grad()
    head.grad = None
    text_only = torch.arange(position_ids.shape[-1]).expand_as(position_ids)
    assert error(got["logits"], run_theirs(model, head, text_only)["logits"]) > 1e-2  # positions matter
