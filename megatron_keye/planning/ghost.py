"""Tensors without content: the trainer's own code runs, its shapes and its decisions are real, its numbers are not.

A ghost is a tensor on the meta device. Inside `Ghosts` every floating-point tensor (and raw pixels) is one, whatever device
was asked for, so that a step of a 30B model at 256K takes no memory. Integers and booleans stay real on the host, because
code decides by them: which tokens go to which expert, how long a document is. Where a decision is taken from a ghost, the
answer is a plan's: the router spreads tokens evenly over the experts, a scalar read is 1, a comparison is false.

Collectives of ghosts end at once. What ran is told to a `Ledger`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_keye.planning.ledger import Ledger, leaves

META = torch.device("meta")
HOST = torch.device("cpu")
RESHAPING = ("resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_")
ALIASING = ("_unsafe_view", "_reshape_alias", "lift_fresh")  # views that do not say so
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


def is_hosted(dtype: torch.dtype) -> bool:
    """What stays real: integers and booleans, and float64, in which the host alone reckons."""
    return dtype is torch.float64 or not (dtype.is_floating_point or dtype is torch.uint8)


def ghost_of(x: Any) -> Any:
    """A tensor's shadow on the meta device, also inside lists; anything else as it is."""
    if isinstance(x, Tensor):
        return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return type(x)(map(ghost_of, x)) if type(x) in (list, tuple) else x


class Ghosts(TorchDispatchMode):
    """with Ghosts(ledger): build and train. Not to be nested."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self._seen: dict[Any, Any] = {}  # operation and shapes -> shapes of what it returns

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, tensors)
        if any(x.is_meta for x in tensors):
            out = self._ghostly(func, args, kwargs)
        else:
            out = self._really(func, args, kwargs, tensors)
        self.ledger.note(func, args, kwargs, tensors, out)
        return out

    def _really(self, func, args, kwargs, tensors) -> Any:
        if "device" in kwargs:
            dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
            kwargs["device"] = HOST if tensors or is_hosted(dtype) else META
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_meta and is_hosted(out.dtype):  # arange makes integers without being told
            out = func(*args, **{**kwargs, "device": HOST})
        if isinstance(out, Tensor):
            return out if is_hosted(out.dtype) else ghost_of(out)
        return type(out)(_float_to_ghost(x) for x in out) if type(out) in (list, tuple) else out

    def _ghostly(self, func, args, kwargs) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return 1.0
        if name == "topk":
            return _even_topk(args[0], args[1])
        if name == "masked_select" and not args[1].is_meta:
            count = int(torch.broadcast_to(args[1], args[0].shape).sum())
            return torch.empty(count, dtype=args[0].dtype, device=META)
        if name == "_grouped_mm":
            return _grouped(*args[:3])
        if name in INDEXING:
            args = (args[0], [i for index in args[1] for i in _places(index)], *args[2:])
        if name.endswith("_") and name not in RESHAPING:
            return args[0]  # changed in place: the same object, which may be a real one
        if "device" in kwargs:
            kwargs["device"] = META
        return self._shapes_of(func, ghost_of(args), {key: ghost_of(x) for key, x in kwargs.items()})

    def _shapes_of(self, func, args, kwargs) -> Any:
        """The operation's meta kernel, run once for each combination of shapes, unless it returns views."""
        views = func.overloadpacket.__name__ in ALIASING or any(r.alias_info for r in func._schema.returns)
        key = None if views else (func, _spec(args), _spec(tuple(kwargs.items())))
        try:
            known = self._seen.get(key) if key is not None else None
        except TypeError:  # an argument that cannot be a key
            key = known = None
        if known is not None:
            made = [_made(*spec) for spec in known[1]]
            return made[0] if known[0] is None else known[0](made)
        out = func(*args, **kwargs)
        parts = [out] if isinstance(out, Tensor) else out
        if key is not None and type(parts) in (list, tuple) and all(isinstance(x, Tensor) for x in parts):
            self._seen[key] = (None if isinstance(out, Tensor) else type(out)), [_spec(x) for x in parts]
        if isinstance(out, Tensor):
            return _host_decisions(out)
        return type(out)(map(_host_decisions, out)) if type(out) in (list, tuple) else out

    def _collective(self, func, args, kwargs, tensors) -> Any:
        group = next(
            ProcessGroup.unbox(x)
            for x in leaves((args, kwargs))
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())  # type: ignore[attr-defined]
        )
        self.ledger.collective(func.overloadpacket.__name__, dist.get_process_group_ranks(group), args)
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        out = tuple(FakeWork().boxed() if "Work" in str(r.type) else args[0] for r in func._schema.returns)
        return out[0] if len(out) == 1 else out


def _even_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [.., k] without content, and real indices that take every column equally often, each once a row."""
    values = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=META)
    return values, (torch.arange(values.numel()) % x.shape[-1]).view(values.shape)


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """[n, in] x [E, in, out] -> [n, out], or [in, n] x [n, out] -> [E, in, out]. torch's meta kernel knows bf16 alone."""
    groups = (len(ends),) if b.dim() == 2 else ()
    return torch.empty(*groups, a.shape[0], b.shape[-1], dtype=a.dtype, device=META)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places it marks, of which there are as many as it has dimensions."""
    if index is None or index.dtype is not torch.bool or index.is_meta:
        return [index]
    return list(index.nonzero().unbind(1))


def _spec(x: Any) -> Any:
    """What of an argument a result's shape depends on."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_spec, x)) if type(x) in (list, tuple) else (type(x), x)


def _made(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if _decides(dtype):
        return torch.zeros(shape, dtype=dtype)
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)


def _decides(dtype: torch.dtype) -> bool:
    return is_hosted(dtype) and dtype is not torch.float64


def _host_decisions(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) and x.is_meta and _decides(x.dtype) else x


def _float_to_ghost(x: Any) -> Any:
    return ghost_of(x) if isinstance(x, Tensor) and not is_hosted(x.dtype) else x
