"""transformers' Qwen3-MoE, eager, as an oracle of our language model: the shapes of a ModelConfig, random weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from keye_data.sample import EncodedSample
from megatron_keye.config.model import ModelConfig


def oracle(cfg: ModelConfig, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Weights are large enough for every part to matter: attention is not uniform and routing not near a tie."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, moe_intermediate_size=cfg.moe_ffn_hidden_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_query_groups, head_dim=cfg.head_dim, num_experts=cfg.num_experts,
        num_experts_per_tok=cfg.experts_per_token, norm_topk_prob=True, rope_theta=cfg.rope_theta,
        rms_norm_eps=cfg.rms_norm_eps, initializer_range=0.1, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def released(model: nn.Module, of: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()) -> dict[str, Tensor]:
    """`of` each parameter by Keye's per-expert names; transformers 5 keeps a layer's experts in one [E, out, in]."""
    found = {}
    for name, parameter in model.named_parameters():
        value = of(parameter)
        if not (fused := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj", name)):
            found[name] = value
            continue
        for e, matrix in enumerate(value):
            parts = zip(("gate", "up"), matrix.chunk(2)) if fused[2] == "gate_up" else [("down", matrix)]
            found |= {f"{fused[1]}.{e}.{part}_proj.weight": piece for part, piece in parts}
    return found


def document_logits(model: Qwen3MoeForCausalLM, sample: EncodedSample) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One document alone -> logits [L, V] and each layer's router logits [L, E]."""
    out = model(torch.from_numpy(sample.input_ids)[None], output_router_logits=True)
    return out.logits[0], out.router_logits


def mean_loss(model: Qwen3MoeForCausalLM, samples: list[EncodedSample]) -> Tensor:
    """transformers' own loss, over all documents, each alone: the mean over every token that is predicted."""
    predicted = sum(int((s.labels[1:] != -100).sum()) for s in samples)
    return torch.stack(
        [
            model(
                torch.from_numpy(s.input_ids)[None],
                labels=torch.from_numpy(s.labels)[None],
                num_items_in_batch=predicted,
            ).loss
            for s in samples
        ]
    ).sum()
