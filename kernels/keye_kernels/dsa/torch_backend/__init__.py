"""The CPU's path, and any device's fallback on request: chunks of queries, masked-dense products, bounded memory.

A chunk of queries looks only at the keys between its lowest key_start and its highest key_stop, so packed documents cost
what they cost apart. Unselected keys are masked rather than gathered around: on a CPU gathers lose. Always deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantise import fake_fp8 as quantise
from .attention import MaskedAttention
from .causal import CausalAttention, causal_sequences
from .chunks import chunks_of_indices, chunks_of_ranges
from .fused import DSAttention
from .scoring import index_scores, indices_of, select


@torch.no_grad()
def select_topk(iq, ik, iw, key_start, key_stop, topk, *, fake_fp8=False) -> Tensor:
    """int32 [T,K]; see ops.select_topk."""
    if fake_fp8:
        iq, ik = quantise(iq), quantise(ik)
    indices = torch.full((iq.shape[0], topk), -1, dtype=torch.int32, device=iq.device)
    for chunk in chunks_of_ranges(key_start, key_stop):
        scores, _ = index_scores(iq[chunk.rows], ik[chunk.keys], iw[chunk.rows])
        indices[chunk.rows] = indices_of(select(scores, chunk.visible(), topk), topk, chunk.keys.start)
    return indices


def sparse_attention(q, k, v, indices, scale=None, *, deterministic=False) -> tuple[Tensor, Tensor]:
    """out [T,Hq,D], lse [T,Hq]; see ops.sparse_attention."""
    return MaskedAttention.apply(q, k, v, _scale(q, scale), chunks_of_indices, indices)


def dense_attention(q, k, v, key_start, key_stop, scale=None) -> tuple[Tensor, Tensor]:
    """out [T,Hq,D], lse [T,Hq]; see ops.dense_attention."""
    sequences = causal_sequences(key_start, key_stop)
    if sequences is not None:
        return CausalAttention.apply(q, k, v, _scale(q, scale), sequences)
    return MaskedAttention.apply(q, k, v, _scale(q, scale), chunks_of_ranges, key_start, key_stop)


def dsa_attention(
    q, k, v, iq, ik, iw, key_start, key_stop, topk, mode="sparse", *,
    scale=None, deterministic=False, fake_fp8=False, return_indices=False, return_kl=True, teacher_group=None, wait=None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """out [T,Hq,D], kl [T] (, indices [T,K]); see ops.dsa_attention."""
    if fake_fp8:
        iq, ik = quantise(iq), quantise(ik)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, iq, ik, iw))
    out, kl, indices = DSAttention.apply(
        q, k, v, iq, ik, iw, key_start, key_stop, topk, mode, _scale(q, scale), teacher_group, return_indices, return_kl,
        keep, wait,
    )  # fmt: skip
    return (out, kl, indices) if return_indices else (out, kl)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
