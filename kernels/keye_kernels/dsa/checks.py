"""Misuse is named before any work: every message begins with the argument at fault."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _tensors(**arguments: Tensor) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _float(
    name: str, x: Tensor, shape: tuple[int | None, ...], device: torch.device, dtype: torch.dtype | None
) -> None:
    """A floating tensor of this shape (None = any size), device and dtype."""
    if x.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        raise ValueError(
            f"{name}: expected shape [{', '.join('*' if n is None else str(n) for n in shape)}], got {list(x.shape)}"
        )
    if x.dtype not in FLOATS or (dtype is not None and x.dtype != dtype):
        raise TypeError(f"{name}: expected {dtype or 'a floating dtype'}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, the first argument on {device}; all tensors must share one device")


def _int32(name: str, x: Tensor, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(
            f"{name}: expected an int32 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, the first argument on {device}; all tensors must share one device")


def check_ranges(key_start: Tensor, key_stop: Tensor, num_queries: int, num_keys: int, device: torch.device) -> None:
    """key_start, key_stop int32 [T] with 0 <= start <= stop <= S."""
    for name, x in (("key_start", key_start), ("key_stop", key_stop)):
        _int32(name, x, device)
        if x.shape != (num_queries,):
            raise ValueError(f"{name}: expected shape [{num_queries}], got {list(x.shape)}")
    if num_queries == 0:
        return
    lowest, highest, shortest = torch.stack((key_start.min(), key_stop.max(), (key_stop - key_start).min())).tolist()
    if lowest < 0:
        raise ValueError(f"key_start: holds {lowest}, the least allowed is 0")
    if highest > num_keys:
        raise ValueError(f"key_stop: holds {highest}, above the number of keys {num_keys}")
    if shortest < 0:
        raise ValueError("key_start: is above key_stop in some row; an empty range has key_start == key_stop")


def check_indices(indices: Tensor, num_queries: int, num_keys: int, device: torch.device) -> None:
    """indices int32 [T,K], each -1 or a key."""
    _int32("indices", indices, device)
    if indices.ndim != 2 or indices.shape[0] != num_queries:
        raise ValueError(f"indices: expected shape [{num_queries}, K], got {list(indices.shape)}")
    if indices.numel():
        lowest, highest = torch.stack(indices.aminmax()).tolist()
        if lowest < -1 or highest >= num_keys:
            raise ValueError(f"indices: hold values from {lowest} to {highest}, allowed are -1 and 0..{num_keys - 1}")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [T,Hq,D]; k, v [S,Hkv,D]; Hkv divides Hq; one dtype, one device."""
    _tensors(q=q, k=k, v=v)
    _float("q", q, (None, None, None), q.device, None)
    _float("k", k, (None, None, q.shape[2]), q.device, q.dtype)
    _float("v", v, tuple(k.shape), q.device, q.dtype)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: has {q.shape[1]} heads, not a multiple of the {k.shape[1]} heads of k and v")


def check_indexer(iq: Tensor, ik: Tensor, iw: Tensor, topk: int, fake_fp8: bool) -> None:
    """iq [T,Hi,Di], ik [S,Di] of one dtype; iw [T,Hi] of any float; topk > 0."""
    _tensors(iq=iq, ik=ik, iw=iw)
    _float("iq", iq, (None, None, None), iq.device, None)
    _float("ik", ik, (None, iq.shape[2]), iq.device, iq.dtype)
    _float("iw", iw, tuple(iq.shape[:2]), iq.device, None)
    if isinstance(topk, bool) or not isinstance(topk, int) or topk <= 0:
        raise ValueError(f"topk: expected a positive int, got {topk!r}")
    if fake_fp8 and iq.shape[2] & (iq.shape[2] - 1):
        raise ValueError(f"fake_fp8: needs an indexer dim that is a power of two, iq has {iq.shape[2]}")


def check_together(q: Tensor, k: Tensor, iq: Tensor, ik: Tensor, mode: str) -> None:
    """Attention and indexer see the same queries and keys."""
    if iq.device != q.device:
        raise ValueError(f"iq: is on {iq.device}, q on {q.device}; all tensors must share one device")
    if iq.shape[0] != q.shape[0]:
        raise ValueError(f"iq: has {iq.shape[0]} queries, q has {q.shape[0]}")
    if ik.shape[0] != k.shape[0]:
        raise ValueError(f"ik: has {ik.shape[0]} keys, k has {k.shape[0]}")
    if mode not in ("sparse", "warmup"):
        raise ValueError(f"mode: {mode!r} is not 'sparse' or 'warmup'")
