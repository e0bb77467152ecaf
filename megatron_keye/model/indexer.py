"""The lightning indexer: 16 small query heads and one key head score every key for every query.

Replicated over tensor-parallel ranks; its input is detached, so it learns from its own KL alone.
Shapes: s tokens of this context rank, b rows, Hi heads of Di.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_keye.model.norms import LayerNorm, RMSNorm
from megatron_keye.model.positions import rotate
from megatron_keye.model.transformer_config import KeyeTransformerConfig


class Indexer(MegatronModule):
    """Parameters as released: `q_proj` holds the query rows first and then one gate row a head."""

    def __init__(self, config: KeyeTransformerConfig, pg_collection):
        super().__init__(config=config)
        self.tensor_group = pg_collection.tp
        heads, dim = config.keye.indexer_heads, config.keye.indexer_head_dim
        self.heads, self.dim = heads, dim
        make = dict(bias=False, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.q_proj = nn.Linear(config.hidden_size, heads * dim + heads, **make)
        self.k_proj = nn.Linear(config.hidden_size, dim, **make)
        self.q_norm = RMSNorm(config, dim, eps=1e-6)
        self.k_norm = LayerNorm(config, dim, eps=1e-6)
        for parameter in self.parameters():
            # Every tensor-parallel rank computes the same gradient from the whole sequence; the mean keeps them equal.
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[s / tp, b, hidden] normalised input -> iq [s, b, Hi, Di], ik [s, b, Di], iw [s, b, Hi].

        The Hadamard turn that follows at serving is orthonormal and cancels in q . k; it is applied only together
        with quantisation (`indexer_fake_fp8`), inside the operator.
        """
        x = hidden.detach()
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tensor_group)
        qw = self.q_proj(x)
        query, gate = qw.split([self.heads * self.dim, self.heads], dim=-1)
        query = self.q_norm(query.unflatten(-1, (self.heads, self.dim)))
        key = self.k_norm(self.k_proj(x))
        return rotate(query, angles), rotate(key[:, :, None], angles)[:, :, 0], gate


class AttachLoss(torch.autograd.Function):
    """Identity on `out`; backward also sends `weight` into `loss`, as if weight * loss.sum() were part of the total."""

    @staticmethod
    def forward(ctx, out: torch.Tensor, loss: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight, ctx.like = weight, (loss.shape, loss.dtype, loss.device)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        shape, dtype, device = ctx.like
        return grads[0], torch.full(shape, ctx.weight, dtype=dtype, device=device), None
