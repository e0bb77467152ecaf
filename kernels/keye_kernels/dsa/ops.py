"""The public operators: check the arguments, find the backend, call it.

T query tokens, S key tokens, Hq query heads, Hkv KV heads, D head dim, Hi indexer heads, Di indexer dim, K = topk.
Query t sees the keys key_start[t] <= s < key_stop[t]; both are int32 [T], and an empty range is allowed.
Misuse raises TypeError or ValueError naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .backends import resolve
from .checks import check_attention, check_indexer, check_indices, check_ranges, check_together


def select_topk(
    iq: Tensor, ik: Tensor, iw: Tensor, key_start: Tensor, key_stop: Tensor, topk: int,
    backend: str | None = None, *, fake_fp8: bool = False,
) -> Tensor:  # fmt: skip
    """The K visible keys of greatest score, equal scores to the lower index.

    iq [T,Hi,Di], ik [S,Di], iw [T,Hi] -> int32 [T,K], ascending, padded with -1 where fewer keys are visible.
    fake_fp8 quantises iq and ik as serving does. Not differentiable.
    """
    check_indexer(iq, ik, iw, topk, fake_fp8)
    check_ranges(key_start, key_stop, iq.shape[0], ik.shape[0], iq.device)
    return resolve(backend, iq.device).select_topk(iq, ik, iw, key_start, key_stop, topk, fake_fp8=fake_fp8)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float | None = None,
    backend: str | None = None, *, deterministic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query over its listed keys.

    q [T,Hq,D], k and v [S,Hkv,D], indices int32 [T,K] (-1 = none, a key at most once a row)
    -> out [T,Hq,D] in q's dtype, lse [T,Hq] float32 (float64 for float64), natural log, not differentiable.
    scale None is D**-0.5. deterministic asks for bit-equal gradients from run to run (always so on a CPU).
    """
    check_attention(q, k, v)
    check_indices(indices, q.shape[0], k.shape[0], q.device)
    return resolve(backend, q.device).sparse_attention(q, k, v, indices, scale, deterministic=deterministic)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_stop: Tensor, scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query over its whole range; shapes and results as in sparse_attention."""
    check_attention(q, k, v)
    check_ranges(key_start, key_stop, q.shape[0], k.shape[0], q.device)
    return resolve(backend, q.device).dense_attention(q, k, v, key_start, key_stop, scale)


def dsa_attention(
    q: Tensor, k: Tensor, v: Tensor, iq: Tensor, ik: Tensor, iw: Tensor, key_start: Tensor, key_stop: Tensor, topk: int,
    mode: str = "sparse", backend: str | None = None, *, scale: float | None = None, deterministic: bool = False,
    fake_fp8: bool = False, return_indices: bool = False, return_kl: bool = True, teacher_group=None,
    wait: Callable[[], None] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Selection, attention and the indexer's loss in one: what a model calls.

    mode "sparse": attention and loss over the selected keys. mode "warmup": both over the whole range.
    -> out [T,Hq,D] in q's dtype, kl [T] float32 (float64 for float64), and with return_indices the selection [T,K].
    out is differentiable in q, k, v only; kl in iq, ik, iw only. With return_kl=False kl is None, its cost is saved, and
    out is the same to the last bit.

    teacher_group: a torch.distributed group whose ranks hold equally many of the query heads (tensor parallelism). The
    teacher then averages the heads of all of them, so kl and its gradients agree on every rank. The forward and the
    backward of kl are collective: every rank must run both, with the same queries and ranges.

    wait: for k and v that are still on their way (a gather begun under context parallelism): called once, before their
    content is read and after the first keys are selected. Until then only their shapes and dtypes need to be right.
    """
    check_attention(q, k, v)
    check_indexer(iq, ik, iw, topk, fake_fp8)
    check_together(q, k, iq, ik, mode)
    if wait is not None and not callable(wait):
        raise TypeError(f"wait: expected a function without arguments, got {type(wait).__name__}")
    check_ranges(key_start, key_stop, q.shape[0], k.shape[0], q.device)
    return resolve(backend, q.device).dsa_attention(
        q, k, v, iq, ik, iw, key_start, key_stop, topk, mode,
        scale=scale, deterministic=deterministic, fake_fp8=fake_fp8, return_indices=return_indices,
        return_kl=return_kl, teacher_group=teacher_group, wait=wait,
    )  # fmt: skip
