"""Megatron-Core on a machine without CUDA: gloo, CPU tensors, and the few places where Megatron insists on a GPU.

This is the only file that touches `torch.cuda`. With CUDA present `install()` does nothing. Each patch stands beside its reason.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

_installed = False

FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "zeros_like",
    "empty_like",
    "ones_like",
    "full_like",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "linspace",
    "eye",
]


def install() -> None:
    """Patch torch and Megatron-Core for CPU use; once, and before anything else imports `megatron.core`."""
    global _installed
    if _installed:
        return
    _installed = True
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings(
        "ignore", message=".*(Transformer Engine|Apex|apex|GPTModel|fused kernel|cpu is not CUDA).*"
    )
    # Megatron calls collectives by names that torch is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        return
    # Megatron jit-fuses with torch.compile: 26 s of inductor for a step of 0.1 s.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_devices()
    _patch_random()
    _patch_streams()
    _patch_collectives()
    _patch_megatron()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return (isinstance(device, torch.device) and device.type == "cuda") or type(device) is int


def _patch_devices() -> None:
    cuda = torch.cuda
    # `with torch.device(...)` looks factories up in this cached set: fill it with the originals before they are wrapped.
    torch.utils._device._device_constructors()
    # Under `torch.device("meta")` this answers meta, so that a model can be built without memory.
    cuda.current_device = torch.get_default_device  # type: ignore[assignment]
    for name in ("set_device", "synchronize", "empty_cache"):
        # One function object per name: torch._dynamo asserts on shared ones.
        setattr(cuda, name, lambda *args, **kwargs: None)

    def on_default_device(factory):
        @functools.wraps(factory)
        def create(*args, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = torch.get_default_device()
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return create

    for name in FACTORIES:
        setattr(torch, name, on_default_device(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]

    tensor_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], (str, torch.device)) and _is_cuda(args[0]):
            args = (torch.device("cpu"), *args[1:])
        if isinstance(kwargs.get("device"), (str, torch.device)) and _is_cuda(kwargs["device"]):
            kwargs["device"] = torch.device("cpu")
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]

    tensor_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        """Optimizers and gradient clipping compare `tensor.type()` with 'torch.cuda.FloatTensor'."""
        name = tensor_type(self, *args, **kwargs)
        if not args and not kwargs and name in ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"):
            return name.replace("torch.", "torch.cuda.")
        return name

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _patch_random() -> None:
    """The "cuda" generator is the CPU's default generator."""
    import torch.cuda.random as cuda_random

    def get_rng_state(device=None):
        return torch.get_rng_state()

    def set_rng_state(state, device=None):
        torch.set_rng_state(state)

    cuda_random.get_rng_state = torch.cuda.get_rng_state = get_rng_state  # type: ignore[assignment]
    cuda_random.set_rng_state = torch.cuda.set_rng_state = set_rng_state  # type: ignore[assignment]
    for name in ("manual_seed", "manual_seed_all"):
        # Not torch.manual_seed: that one calls back into torch.cuda.
        setattr(torch.cuda, name, lambda seed: torch.default_generator.manual_seed(int(seed)))


class Stream:
    """A stream that is always done."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs): ...

    def wait_stream(self, *args): ...

    def wait_event(self, *args): ...

    def synchronize(self): ...

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or Event()

    def __enter__(self):
        return self

    def __exit__(self, *args): ...


class Event:
    """An event that happens when it is recorded."""

    def __init__(self, *args, **kwargs):
        self._at = 0.0

    def record(self, *args):
        self._at = time.perf_counter()

    def wait(self, *args): ...

    def synchronize(self): ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        """Milliseconds from this event to `other`."""
        return (other._at - self._at) * 1000


class _NoRanges:
    range_push = staticmethod(lambda *args, **kwargs: None)
    range_pop = staticmethod(lambda *args, **kwargs: None)
    range = staticmethod(lambda *args, **kwargs: contextlib.nullcontext())


def _patch_streams() -> None:
    cuda: Any = torch.cuda
    only = Stream()
    cuda.Stream, cuda.Event, cuda.nvtx = Stream, Event, _NoRanges
    cuda.current_stream = lambda *args, **kwargs: only
    cuda.default_stream = lambda *args, **kwargs: only
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, *args: None  # type: ignore[method-assign,assignment]


def _patch_collectives() -> None:
    """gloo refuses lists of uneven tensors, which the all-to-all dispatcher uses when experts are tensor-parallel."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def even(tensors) -> bool:
        return len({t.shape[0] if t.dim() else 1 for t in tensors}) <= 1

    def all_gather_uneven(outputs, tensor, group=None, async_op=False):
        if even(outputs):
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        longest = max(len(o) for o in outputs)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group=group)
        for output, full in zip(outputs, gathered):
            output.copy_(full[: len(output)])
        return None

    def reduce_scatter_uneven(output, inputs, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if even(inputs):
            return reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
        everything = torch.cat(inputs)
        dist.all_reduce(everything, op=op, group=group)
        output.copy_(everything.split([len(i) for i in inputs])[dist.get_rank(group)])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather_uneven, reduce_scatter_uneven


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # Restoring a state goes through torch.cuda._lazy_call, which without CUDA only queues it:
    # replicated weights would silently start different on every rank.
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 without Transformer Engine: NameError with an fp32 router

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        """The original asks `is_cuda` first and hands all_to_all_single tensors as split sizes."""
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu

    def set_main_param_and_optimizer_states(self, model_param, tensors):
        """torch's Adam keeps a `step` per parameter that is not among the checkpoint's tensors."""
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, value in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":
                value.copy_(tensors[key])

    load = DistributedOptimizer.load_state_dict

    def load_state_dict(self, state_dict):
        """Megatron shares one `step` tensor between all parameters: Adam would advance it once per parameter."""
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    DistributedOptimizer.load_state_dict = load_state_dict
