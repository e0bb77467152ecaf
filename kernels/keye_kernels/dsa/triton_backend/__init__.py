"""The GPU's path: blocks of 16 neighbouring queries share one gathered union of keys; chunks bound the memory.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, for tests. fp16, bf16 and fp32 inputs, fp32 sums.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..quantise import fake_fp8 as quantise
from . import plain
from .blocks import block_windows, chunks_of
from .fused import DSAttention, Settings
from .scores import scores
from .thresholds import thresholds
from .union import words, write_indices

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.install()


@torch.no_grad()
def select_topk(iq, ik, iw, key_start, key_stop, topk, *, fake_fp8=False) -> Tensor:
    """int32 [T,K]; see ops.select_topk."""
    _check_dtype(iq=iq)
    iq, ik, iw = _indexer(iq, ik, iw, fake_fp8)
    key_start, key_stop = key_start.contiguous(), key_stop.contiguous()
    indices = torch.full((iq.shape[0], topk), -1, dtype=torch.int32, device=iq.device)
    windows = block_windows(key_start, key_stop)
    for chunk in chunks_of(windows, len(key_start)):
        logits = scores(iq, ik, iw, key_start, key_stop, chunk)
        tau, cut = thresholds(logits, key_start, key_stop, chunk, topk)
        marks, _ = words(logits, tau, cut, key_start, key_stop, windows, chunk)
        write_indices(marks, windows, chunk, indices)
    return indices


def sparse_attention(q, k, v, indices, scale=None, *, deterministic=False) -> tuple[Tensor, Tensor]:
    """out [T,Hq,D], lse [T,Hq]; see ops.sparse_attention."""
    _check_dtype(q=q)
    return plain.sparse_attention(q, k, v, indices, _scale(q, scale), deterministic=deterministic)


def dense_attention(q, k, v, key_start, key_stop, scale=None) -> tuple[Tensor, Tensor]:
    """out [T,Hq,D], lse [T,Hq]; see ops.dense_attention."""
    _check_dtype(q=q)
    return plain.dense_attention(q, k, v, key_start, key_stop, _scale(q, scale))


def dsa_attention(
    q, k, v, iq, ik, iw, key_start, key_stop, topk, mode="sparse", *,
    scale=None, deterministic=False, fake_fp8=False, return_indices=False, return_kl=True, teacher_group=None, wait=None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """out [T,Hq,D], kl [T] (, indices [T,K]); see ops.dsa_attention."""
    _check_dtype(q=q, iq=iq)
    # k and v may still be on their way: nothing here may read them, not even to make them contiguous
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, iq, ik, iw))
    settings = Settings(
        topk, mode == "sparse", _scale(q, scale), deterministic, teacher_group, return_indices, return_kl, keep
    )
    out, kl, indices = DSAttention.apply(
        q.contiguous(),
        k,
        v,
        *_indexer(iq, ik, iw, fake_fp8),
        key_start.contiguous(),
        key_stop.contiguous(),
        settings,
        wait,
    )
    return (out, kl, indices) if return_indices else (out, kl)


def _indexer(iq: Tensor, ik: Tensor, iw: Tensor, fake_fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous; quantised on request, kept in bf16 for narrow inputs: e4m3 times a power of two is exact there."""
    if fake_fp8:
        kept = torch.float32 if iq.dtype == torch.float32 else torch.bfloat16
        iq, ik = quantise(iq).to(kept), quantise(ik).to(kept)
    return iq.contiguous(), ik.contiguous(), iw.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale: the triton backend needs a positive number, got {scale}; use backend='torch'")
    return scale


def _check_dtype(**arguments: Tensor) -> None:
    for name, x in arguments.items():
        if x.dtype == torch.float64:
            raise TypeError(f"{name}: the triton backend computes float16, bfloat16 and float32; use backend='torch'")
