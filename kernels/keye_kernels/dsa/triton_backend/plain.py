"""Attention alone, without an indexer: over a list of keys for each query, or over its whole range.

T queries, S keys, Hq query heads, Hkv KV heads, D head dim, K = entries of a row of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_forward import forward
from .blocks import block_windows, chunks_of
from .contiguous_backward import contiguous_backward
from .delta import delta
from .union import index_windows, union, words_of_indices
from .union_backward import union_backward
from .views import View, cheaper, pack, unpack


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sums: Tensor, scale: float, view: View,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, deterministic: bool,
) -> None:  # fmt: skip
    """Writes the chunk's rows of grad_q [T,Hq,D]; adds to grad_k and grad_v, float32 [S,Hkv,D]. sums are those of `delta`.

    The view is one of `cheaper`. deterministic matters to a union alone: contiguous keys are always added in one order.
    """
    if view.union is not None:
        union_backward(grad_out, q, k, v, lse, sums, scale, view, grad_q, grad_k, grad_v, deterministic)
    else:
        contiguous_backward(grad_out, q, k, v, lse, sums, scale, view, grad_q, grad_k, grad_v)


def listed_views(indices: Tensor) -> Iterator[tuple[View, View]]:
    """int32 [T,K], -1 padded -> for each chunk of queries the view to keep, a union, and the one to run."""
    windows = index_windows(indices)
    for chunk in chunks_of(windows, len(indices)):
        words, counts = words_of_indices(indices, windows, chunk)
        kept = View(chunk, windows, union=union(words, counts, windows, chunk))
        yield kept, cheaper(kept, words)


def ranged_views(key_start: Tensor, key_stop: Tensor) -> Iterator[tuple[View, View]]:
    """int32 [T], [T] -> as above, both the ranges. Nothing here holds rows x keys: only the rows of a chunk are bounded."""
    windows = block_windows(key_start, key_stop)
    for chunk in chunks_of(windows, len(key_start), pairs=2**62):
        view = View(chunk, windows, ranges=(key_start, key_stop))
        yield view, view


class ViewedAttention(torch.autograd.Function):
    """out, lse = apply(q, k, v, scale, deterministic, views, *marks); all contiguous; views(*marks) are those to run."""

    @staticmethod
    def forward(ctx, q, k, v, scale: float, deterministic: bool, views: Callable, *marks):
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        keeps: list[View] = []
        for kept, view in views(*marks):
            forward(q, k, v, scale, view, out, lse)
            keeps.append(kept)
        ctx.packed, tensors = pack(keeps)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.scale, ctx.deterministic, ctx.num_marks = scale, deterministic, len(marks)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        sums = delta(out, grad_out)
        for view in map(cheaper, unpack(ctx.packed, tensors)):
            backward(grad_out, q, k, v, lse, sums, ctx.scale, view, grad_q, grad_k, grad_v, ctx.deterministic)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), *(None,) * (3 + ctx.num_marks)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float | None = None, *, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k and v [S,Hkv,D], indices int32 [T,K] -> out [T,Hq,D], lse float32 [T,Hq]."""
    return _attention(q, k, v, scale, deterministic, listed_views, indices)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_stop: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k and v [S,Hkv,D], key_start and key_stop int32 [T] -> out [T,Hq,D], lse float32 [T,Hq]."""
    return _attention(q, k, v, scale, True, ranged_views, key_start, key_stop)


def _attention(q, k, v, scale, deterministic, views, *marks):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return ViewedAttention.apply(q, k, v, scale, deterministic, views, *(x.contiguous() for x in marks))
