"""Selection, attention and the indexer's loss in one pass over the chunks, so that each chunk's matrices live once.

The backward recomputes a chunk's probabilities and scores from the saved selection. It also forms the loss's gradient:
that of ik is a sum over queries weighted by grad_kl[t], which differs from row to row when a caller masks tokens, so it
cannot be prepared in the forward and scaled later.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quantise import accumulate_dtype
from .attention import attention_gradients, group_heads, keys_first, logits_of, probabilities_of, ungroup_heads
from .chunks import Chunk, bias_of, chunks_of_ranges
from .scoring import index_scores, indices_of, score_gradients, select


def teacher_of(probabilities: Tensor, num_rows: int, group) -> Tensor:
    """[Hkv,G*C,N] -> p [C,N]: mean over the heads here and on every rank of the group."""
    heads = probabilities.view(-1, num_rows, probabilities.shape[-1])
    total, num_heads = heads.sum(0), heads.shape[0]
    if group is not None:
        dist.all_reduce(total, group=group)
        num_heads *= dist.get_world_size(group)
    return total.div_(num_heads)


def arrived(k: Tensor, v: Tensor, wait: Callable[[], None] | None) -> tuple[Tensor, Tensor]:
    """[S,Hkv,D] that may still be on their way -> both [Hkv,S,D], in the accumulation dtype."""
    if wait is not None:
        wait()
    return keys_first(k), keys_first(v)


class DSAttention(torch.autograd.Function):
    """out, kl, indices = apply(...); indices is None unless asked for or needed by the backward."""

    @staticmethod
    def forward(
        ctx, q, k, v, iq, ik, iw, key_start, key_stop, topk, mode, scale, teacher_group, return_indices, return_kl,
        keep, wait,
    ):  # fmt: skip
        num_queries, sparse = q.shape[0], mode == "sparse"
        indices = None
        if return_indices or (keep and sparse):
            indices = torch.full((num_queries, topk), -1, dtype=torch.int32, device=q.device)
        out = torch.zeros_like(q)
        kl = torch.zeros(num_queries, dtype=accumulate_dtype(iq), device=q.device)
        heads = None
        for chunk in chunks_of_ranges(key_start, key_stop):
            scores, agreement = index_scores(iq[chunk.rows], ik[chunk.keys], iw[chunk.rows])
            del agreement  # the widest matrix of the chunk
            mask = visible = chunk.visible()
            if sparse or return_indices:
                chosen = select(scores, visible, topk)
                mask = chosen if sparse else visible
                if indices is not None:
                    indices[chunk.rows] = indices_of(chosen, topk, chunk.keys.start)
            k_heads, v_heads = heads = heads or arrived(k, v, wait)  # the first selection hides their journey
            bias, has_key = bias_of(mask, k_heads.dtype), chunk.has_key()
            q_chunk = group_heads(q[chunk.rows], k.shape[1])
            probabilities = probabilities_of(logits_of(q_chunk, k_heads[:, chunk.keys], bias, scale), has_key)
            out[chunk.rows] = ungroup_heads(torch.bmm(probabilities, v_heads[:, chunk.keys]), len(has_key)).to(q.dtype)
            if return_kl:
                p = teacher_of(probabilities, len(has_key), teacher_group).to(scores.dtype)
                log_student = (scores + bias).log_softmax(-1)
                kl[chunk.rows] = torch.nn.functional.kl_div(log_student, p, reduction="none").sum(-1)
        if heads is None:  # no query sees a key; what was begun is ended all the same
            arrived(k, v, wait)
        if keep:
            ctx.save_for_backward(q, k, v, iq, ik, iw, key_start, key_stop, indices if sparse else None)
            ctx.scale, ctx.teacher_group = scale, teacher_group
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return out, kl if return_kl else None, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_kl, _):
        q, k, v, iq, ik, iw, key_start, key_stop, indices = ctx.saved_tensors
        attends = grad_out is not None and any(ctx.needs_input_grad[:3])
        teaches = grad_kl is not None and any(ctx.needs_input_grad[3:6])
        k_heads, v_heads = keys_first(k), keys_first(v)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        grad_iq, grad_iw = torch.zeros_like(iq), torch.zeros_like(iw)
        grad_ik = torch.zeros_like(ik, dtype=accumulate_dtype(iq))
        for chunk in chunks_of_ranges(key_start, key_stop) if attends or teaches else ():
            rows, keys = chunk.rows, chunk.keys
            if indices is not None:
                chunk = Chunk(rows, keys, indices=indices[rows])
            bias, has_key = chunk.bias(k_heads.dtype), chunk.has_key()
            q_chunk, k_chunk, v_chunk = group_heads(q[rows], k.shape[1]), k_heads[:, keys], v_heads[:, keys]
            probabilities = probabilities_of(logits_of(q_chunk, k_chunk, bias, ctx.scale), has_key)
            if attends:
                grad_q_chunk = attention_gradients(
                    group_heads(grad_out[rows], k.shape[1]), probabilities, q_chunk, k_chunk, v_chunk,
                    ctx.scale, grad_k[:, keys], grad_v[:, keys],
                )  # fmt: skip
                grad_q[rows] = ungroup_heads(grad_q_chunk, len(has_key)).to(q.dtype)
            if teaches:
                p = teacher_of(probabilities, len(has_key), ctx.teacher_group).to(grad_ik.dtype)
                del probabilities
                scores, agreement = index_scores(iq[rows], ik[keys], iw[rows])
                student = scores.add_(bias).softmax(-1).mul_(has_key[:, None])
                grad_scores = student.sub_(p).mul_(grad_kl[rows, None])
                d_iq, d_ik, d_iw = score_gradients(grad_scores, agreement, iq[rows], ik[keys], iw[rows])
                grad_iq[rows], grad_iw[rows] = d_iq.to(iq.dtype), d_iw.to(iw.dtype)
                grad_ik[keys] += d_ik
        for_attention = (grad_q, grad_k.transpose(0, 1).to(k.dtype), grad_v.transpose(0, 1).to(v.dtype))
        for_indexer = (grad_iq, grad_ik.to(ik.dtype), grad_iw)
        unasked = (None,) * 3
        return *(for_attention if attends else unasked), *(for_indexer if teaches else unasked), *(None,) * 10
