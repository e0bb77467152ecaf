"""The definition of every operator: plain PyTorch, whole [T,S] matrices, autograd, any dtype up to float64.

T query tokens, S key tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, Hi indexer heads, Di indexer dim,
K = topk. Inputs narrower than float32 are computed in float32. Readable before fast; memory O(T*S*(Hq+Hi)).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .quantise import accumulate_dtype
from .quantise import fake_fp8 as quantise


def index_scores(iq: Tensor, ik: Tensor, iw: Tensor) -> Tensor:
    """iq [T,Hi,Di], ik [S,Di], iw [T,Hi] -> I [T,S] = Di**-0.5 * sum_h iw[t,h] * relu(iq[t,h] . ik[s])."""
    acc = accumulate_dtype(iq)
    agreement = torch.einsum("thd,sd->ths", iq.to(acc), ik.to(acc)).relu()
    return torch.einsum("th,ths->ts", iw.to(acc), agreement) * iq.shape[-1] ** -0.5


def range_mask(key_start: Tensor, key_stop: Tensor, num_keys: int) -> Tensor:
    """[T], [T] -> bool [T,S]: which keys a query may see."""
    s = torch.arange(num_keys, device=key_start.device)
    return (s >= key_start[:, None]) & (s < key_stop[:, None])


def index_mask(indices: Tensor, num_keys: int) -> Tensor:
    """int32 [T,K], -1 padded -> bool [T,S]."""
    slots = torch.where(indices < 0, num_keys, indices).long()
    mask = torch.zeros(indices.shape[0], num_keys + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, slots, True)[:, :num_keys]


@torch.no_grad()
def select_topk(iq, ik, iw, key_start, key_stop, topk, *, fake_fp8=False) -> Tensor:
    """int32 [T,K]: greatest scores, ties to the lower index (stable sort), ascending, padded with -1."""
    if fake_fp8:
        iq, ik = quantise(iq), quantise(ik)
    num_queries, num_keys = iq.shape[0], ik.shape[0]
    visible = range_mask(key_start, key_stop, num_keys)
    scores = index_scores(iq, ik, iw).masked_fill(~visible, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    order = torch.where(visible.gather(1, order), order, num_keys).sort(dim=-1).values
    indices = order.new_full((num_queries, topk), -1)
    indices[:, : order.shape[1]] = torch.where(order == num_keys, -1, order)
    return indices.int()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over mask [T,S] -> out [T,Hq,D], lse [T,Hq], probabilities [Hkv,G,T,S]; rows without a key are zero."""
    num_queries, num_heads, head_dim = q.shape
    acc, num_groups = accumulate_dtype(q), k.shape[1]
    q_grouped = q.to(acc).view(num_queries, num_groups, num_heads // num_groups, head_dim)
    logits = torch.einsum("tngd,snd->ngts", q_grouped, k.to(acc)) * (head_dim**-0.5 if scale is None else scale)
    has_key = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~(mask | ~has_key), -torch.inf)  # a row without a key keeps finite logits: no NaN
    probabilities = logits.softmax(-1) * has_key
    out = torch.einsum("ngts,snd->tngd", probabilities, v.to(acc)).reshape(q.shape)
    lse = logits.detach().logsumexp(-1).masked_fill(~has_key[:, 0], -torch.inf)
    return out.to(q.dtype), lse.permute(2, 0, 1).reshape(num_queries, num_heads), probabilities


def sparse_attention(q, k, v, indices, scale=None, *, deterministic=False) -> tuple[Tensor, Tensor]:
    """Attention over the listed keys -> out [T,Hq,D], lse [T,Hq]."""
    return _attend(q, k, v, index_mask(indices, k.shape[0]), scale)[:2]


def dense_attention(q, k, v, key_start, key_stop, scale=None) -> tuple[Tensor, Tensor]:
    """Attention over the whole range -> out [T,Hq,D], lse [T,Hq]."""
    return _attend(q, k, v, range_mask(key_start, key_stop, k.shape[0]), scale)[:2]


def teacher(probabilities: Tensor, group=None) -> Tensor:
    """[Hkv,G,T,S] -> p [T,S], the mean over the heads of this process and of every rank of `group`; detached."""
    total = probabilities.detach().sum((0, 1))
    heads = probabilities.shape[0] * probabilities.shape[1]
    if group is not None:
        dist.all_reduce(total, group=group)
        heads *= dist.get_world_size(group)
    return total / heads


def indexer_kl(p: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """KL(p[t] || softmax of scores[t] over mask[t]) -> [T]; 0 for a row without a key."""
    safe = mask | ~mask.any(-1, keepdim=True)
    log_q = scores.masked_fill(~safe, -torch.inf).log_softmax(-1).masked_fill(~mask, 0)
    return (torch.special.xlogy(p, p) - p * log_q).sum(-1)


def dsa_attention(
    q, k, v, iq, ik, iw, key_start, key_stop, topk, mode="sparse", *,
    scale=None, deterministic=False, fake_fp8=False, return_indices=False, return_kl=True, teacher_group=None, wait=None,
):  # fmt: skip
    """Select, attend, and score the indexer -> out [T,Hq,D], kl [T] (, indices [T,K])."""
    if fake_fp8:
        iq, ik = quantise(iq), quantise(ik)
    num_keys, indices = k.shape[0], None
    if mode == "sparse" or return_indices:
        indices = select_topk(iq, ik, iw, key_start, key_stop, topk)
    mask = index_mask(indices, num_keys) if mode == "sparse" else range_mask(key_start, key_stop, num_keys)
    if wait is not None:
        wait()
    out, _, probabilities = _attend(q, k, v, mask, scale)
    kl = None
    if return_kl:
        scores = index_scores(iq, ik, iw)
        kl = indexer_kl(teacher(probabilities, teacher_group).to(scores.dtype), scores, mask)
    return (out, kl, indices) if return_indices else (out, kl)
