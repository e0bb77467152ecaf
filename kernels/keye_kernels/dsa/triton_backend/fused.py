"""Selection, attention and the indexer's loss, chunk by chunk of the queries: a chunk's scores live only while it runs.

Between the passes only the union form of the selection is kept (6 bytes for each key of a block's union), with lse and
the student's normaliser. The loss's gradient is formed in the backward, because ik's sums over queries that each have a
grad_kl of their own. T queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_forward import forward as attention_forward
from .blocks import PAIRS_PER_CHUNK, Chunk, block_windows, chunks_of
from .delta import delta
from .divergence import divergence
from .indexer_backward import indexer_backward
from .plain import backward as attention_backward
from .score_gradient import score_gradient
from .scores import scores
from .teacher import teacher
from .thresholds import thresholds
from .union import union, words, write_indices
from .views import View, cheaper, pack, unpack


@dataclass(frozen=True)
class Settings:
    topk: int
    sparse: bool  # else the warm-up: attention and loss over the whole ranges
    scale: float
    deterministic: bool
    teacher_group: Any
    return_indices: bool
    return_kl: bool
    keep: bool  # what the backward needs


class DSAttention(torch.autograd.Function):
    """out, kl, indices = apply(q, k, v, iq, ik, iw, key_start, key_stop, settings, wait), kl and indices where asked for.

    All contiguous but k and v, whose content is there only after wait().
    """

    @staticmethod
    def forward(ctx, q, k, v, iq, ik, iw, key_start, key_stop, settings: Settings, wait):
        num_queries, sparse = q.shape[0], settings.sparse
        indices = None
        if settings.return_indices:
            indices = torch.full((num_queries, settings.topk), -1, dtype=torch.int32, device=q.device)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        kl, student_lse = (torch.zeros(num_queries, dtype=torch.float32, device=q.device) for _ in range(2))
        windows = block_windows(key_start, key_stop)
        kept: list[View] = []
        for chunk in _chunks(windows, num_queries, sparse):
            marks, view = None, View(chunk, windows, ranges=(key_start, key_stop))
            logits = scores(iq, ik, iw, key_start, key_stop, chunk)
            if sparse or indices is not None:
                tau, cut = thresholds(logits, key_start, key_stop, chunk, settings.topk)
                marks, counts = words(logits, tau, cut, key_start, key_stop, windows, chunk)
                if indices is not None:
                    write_indices(marks, windows, chunk, indices)
            if sparse:
                view = View(chunk, windows, union=union(marks, counts, windows, chunk))
            if wait is not None:  # the selection is under way: now keys and values are needed
                wait()
                wait = None
                k, v = k.contiguous(), v.contiguous()
            attention_forward(q, k, v, settings.scale, cheaper(view, marks), out, lse)
            del marks
            if settings.return_kl:
                p, heads = _teacher(q, k, lse, key_start, key_stop, view, settings)
                divergence(p, logits, heads, key_start, key_stop, windows, chunk, kl, student_lse, view.union)
                del p
            if settings.keep:
                kept.append(view)
        if wait is not None:
            wait()
        ctx.settings = settings
        if settings.keep:
            ctx.packed, tensors = pack(kept)
            ctx.save_for_backward(q, k, v, iq, ik, iw, key_start, key_stop, out, lse, student_lse, *tensors)
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return out, kl if settings.return_kl else None, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_kl, _):
        q, k, v, iq, ik, iw, key_start, key_stop, out, lse, student_lse, *tensors = ctx.saved_tensors
        settings = ctx.settings
        attends = grad_out is not None and any(ctx.needs_input_grad[:3])
        teaches = grad_kl is not None and any(ctx.needs_input_grad[3:6])
        for_attention: tuple[Tensor | None, ...] = (None,) * 3
        for_indexer: tuple[Tensor | None, ...] = (None,) * 3
        if attends:
            grad_out, grad_q = grad_out.contiguous(), torch.zeros_like(q)
            grad_k, grad_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
            sums = delta(out, grad_out)
        if teaches:
            grad_kl, grad_iq, grad_iw = grad_kl.contiguous(), torch.zeros_like(iq), torch.zeros_like(iw)
            grad_ik = torch.zeros(ik.shape, dtype=torch.float32, device=ik.device)
        for view in unpack(ctx.packed, tensors) if attends or teaches else ():
            if attends:
                attention_backward(
                    grad_out, q, k, v, lse, sums, settings.scale, cheaper(view), grad_q, grad_k, grad_v,
                    settings.deterministic,
                )  # fmt: skip
            if teaches:
                chunk, windows, listed = view.chunk, view.windows, view.union
                p, heads = _teacher(q, k, lse, key_start, key_stop, view, settings)
                logits = scores(iq, ik, iw, key_start, key_stop, chunk) if listed is None else None
                score_gradient(
                    p, heads, iq, ik, iw, student_lse, grad_kl, key_start, key_stop, windows, chunk, listed, logits
                )
                del logits
                indexer_backward(
                    p, iq, ik, iw, windows, chunk, grad_iq, grad_iw, grad_ik, listed, settings.deterministic
                )
                del p
        if attends:
            for_attention = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
        if teaches:
            for_indexer = grad_iq, grad_ik.to(ik.dtype), grad_iw
        return *for_attention, *for_indexer, *(None,) * 4


def _chunks(windows: Tensor, num_queries: int, sparse: bool) -> list[Chunk]:
    """In the warm-up a chunk holds the teacher as a matrix beside the scores, so it gets half as many pairs."""
    return chunks_of(windows, num_queries, PAIRS_PER_CHUNK if sparse else PAIRS_PER_CHUNK // 2)


def _teacher(
    q: Tensor, k: Tensor, lse: Tensor, key_start: Tensor, key_stop: Tensor, view: View, settings: Settings
) -> tuple[Tensor, int]:
    """The heads' probabilities summed, here and on every rank of the group, and of how many heads that is."""
    p, heads = teacher(q, k, lse, settings.scale, key_start, key_stop, view.windows, view.chunk, view.union), q.shape[1]
    if settings.teacher_group is not None:
        dist.all_reduce(p, group=settings.teacher_group)
        heads *= dist.get_world_size(settings.teacher_group)
    return p, heads
