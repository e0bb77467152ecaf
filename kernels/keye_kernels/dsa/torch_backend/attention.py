"""Attention of one chunk over its masked keys, forward and backward, and the operator made of such chunks.

C query rows, N keys, Hq query heads in Hkv groups of G, D head dim. Heads lead: q [Hkv,G*C,D], k and v [Hkv,N,D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quantise import accumulate_dtype


def group_heads(x: Tensor, num_groups: int) -> Tensor:
    """[C,Hq,D] -> [Hkv,G*C,D] in the accumulation dtype."""
    num_rows, num_heads, dim = x.shape
    x = x.to(accumulate_dtype(x)).view(num_rows, num_groups, num_heads // num_groups, dim)
    return x.permute(1, 2, 0, 3).reshape(num_groups, -1, dim)


def ungroup_heads(x: Tensor, num_rows: int) -> Tensor:
    """[Hkv,G*C,D] -> [C,Hq,D]."""
    return x.unflatten(1, (-1, num_rows)).permute(2, 0, 1, 3).flatten(1, 2)


def keys_first(x: Tensor) -> Tensor:
    """[S,Hkv,D] -> [Hkv,S,D], contiguous, in the accumulation dtype."""
    return x.to(accumulate_dtype(x)).transpose(0, 1).contiguous()


def logits_of(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [Hkv,G*C,D], k [Hkv,N,D], bias [C,N] -> [Hkv,G*C,N]."""
    logits = torch.bmm(q * scale, k.transpose(1, 2))
    logits.unflatten(1, (-1, bias.shape[0])).add_(bias)
    return logits


def probabilities_of(logits: Tensor, has_key: Tensor) -> Tensor:
    """[Hkv,G*C,N], bool [C] -> softmax over N, zero in the rows that see no key."""
    probabilities = logits.softmax(-1)
    if not has_key.all():
        probabilities.unflatten(1, (-1, len(has_key))).mul_(has_key[:, None])
    return probabilities


def attention_gradients(
    grad_out: Tensor,
    probabilities: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """grad_out as q; adds to grad_k and grad_v [Hkv,N,D] in place and returns the gradient of q [Hkv,G*C,D]."""
    grad_p = torch.bmm(grad_out, v.transpose(1, 2))
    grad_logits = torch.ops.aten._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
    grad_v.baddbmm_(probabilities.transpose(1, 2), grad_out)
    grad_k.baddbmm_(grad_logits.transpose(1, 2), q, alpha=scale)
    return torch.bmm(grad_logits, k).mul_(scale)


class MaskedAttention(torch.autograd.Function):
    """out, lse = apply(q, k, v, scale, chunker, *marks): marks are what chunker cuts, ranges or indices."""

    @staticmethod
    def forward(ctx, q, k, v, scale, chunker, *marks):
        ctx.save_for_backward(q, k, v, *marks)
        ctx.scale, ctx.chunker = scale, chunker
        k_heads, v_heads = keys_first(k), keys_first(v)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=k_heads.dtype, device=q.device)
        for chunk in chunker(*marks):
            q_chunk = group_heads(q[chunk.rows], k.shape[1])
            bias, has_key = chunk.bias(k_heads.dtype), chunk.has_key()
            logits = logits_of(q_chunk, k_heads[:, chunk.keys], bias, scale)
            probabilities = probabilities_of(logits, has_key)
            out[chunk.rows] = ungroup_heads(torch.bmm(probabilities, v_heads[:, chunk.keys]), len(has_key)).to(q.dtype)
            # The greatest probability is exp(greatest logit - lse): two reductions instead of a second pass of exp.
            chunk_lse = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
            lse[chunk.rows] = ungroup_heads(chunk_lse, len(has_key))[..., 0].masked_fill(~has_key[:, None], -torch.inf)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, k, v, *marks = ctx.saved_tensors
        k_heads, v_heads = keys_first(k), keys_first(v)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        for chunk in ctx.chunker(*marks):
            q_chunk, has_key = group_heads(q[chunk.rows], k.shape[1]), chunk.has_key()
            k_chunk, v_chunk = k_heads[:, chunk.keys], v_heads[:, chunk.keys]
            logits = logits_of(q_chunk, k_chunk, chunk.bias(k_heads.dtype), ctx.scale)
            grad_q_chunk = attention_gradients(
                group_heads(grad_out[chunk.rows], k.shape[1]), probabilities_of(logits, has_key), q_chunk, k_chunk, v_chunk,
                ctx.scale, grad_k[:, chunk.keys], grad_v[:, chunk.keys],
            )  # fmt: skip
            grad_q[chunk.rows] = ungroup_heads(grad_q_chunk, len(has_key)).to(q.dtype)
        return (
            grad_q,
            grad_k.transpose(0, 1).to(k.dtype),
            grad_v.transpose(0, 1).to(v.dtype),
            *(None,) * (2 + len(marks)),
        )
