"""transformers' DeepSeek-V3.2 indexer as an oracle of ours: its own code, with weights mapped to ours.

T tokens attending to themselves, Hi indexer heads, Di indexer dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer


def oracle(hidden: int, query_input: int, heads: int, dim: int, topk: int) -> DeepseekV32Indexer:
    """Rotary positions over all of `dim`, as Keye has them; DeepSeek turns 64 of 128."""
    config = DeepseekV32Config(
        hidden_size=hidden, q_lora_rank=query_input, index_n_heads=heads, index_head_dim=dim, qk_rope_head_dim=dim,
        index_topk=topk, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return DeepseekV32Indexer(config, 0)


class _Scores(TorchFunctionMode):
    """Keeps what topk is asked of."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.topk:
            self.found = args[0]
        return function(*args, **(kwargs or {}))


def score_and_choose(
    indexer: DeepseekV32Indexer, hidden: Tensor, query_input: Tensor, cos_sin: tuple[Tensor, Tensor], visible: Tensor
) -> tuple[Tensor, Tensor]:
    """hidden [T, h], query_input [T, w], cos_sin [T, Di] each, visible bool [T, T]
    -> scores [T, T], -inf where not visible, differentiable; and what it chose, bool [T, T].

    Where fewer than K keys are visible theirs lists masked keys too, and leaves it to the attention mask to drop them.
    """
    with _Scores() as scores:
        forward = DeepseekV32Indexer.forward.__wrapped__  # without its no_grad
        cos, sin = (x[None] for x in cos_sin)
        indices = forward(indexer, hidden[None], query_input[None], (cos, sin), visible[None], None)[0]
    return scores.found[0], torch.zeros_like(visible).scatter_(1, indices.long(), True) & visible


def identity(heads: int, dim: int, topk: int) -> DeepseekV32Indexer:
    """An oracle whose projections pass through: query_input is iq [T, Hi * Di], hidden is cat(ik, iw) [T, Di + Hi].

    Its norm of k is taken out, and the gate's factor Hi^-0.5, which Keye does not have, is undone in the weights.
    """
    indexer = oracle(dim + heads, heads * dim, heads, dim, topk)
    indexer.k_norm = nn.Identity()
    with torch.no_grad():
        indexer.wq_b.weight.copy_(torch.eye(heads * dim))
        indexer.wk.weight.copy_(torch.eye(dim, dim + heads))
        indexer.weights_proj.weight.zero_()[:, dim:].copy_(torch.eye(heads) * heads**0.5)
    return indexer


def assert_same_choice(got: Tensor, want: Tensor, scores: Tensor) -> None:
    """Chosen keys, bool [T, T] each. A key may be in one alone only if its score is that of the last chosen, but for
    rounding, and that may happen in one row of fifty."""
    assert torch.equal(got.sum(-1), want.sum(-1))
    odd = got ^ want
    last = scores.masked_fill(~want, torch.inf).amin(-1, keepdim=True)
    finite = scores[scores.isfinite()]
    assert bool(((scores - last).abs()[odd] <= 1e-5 * finite.abs().max()).all())
    assert float(odd.any(-1).double().mean()) <= 0.02
