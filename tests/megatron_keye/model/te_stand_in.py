"""A stand-in for Transformer Engine: the classes that Megatron-Core builds from it, with plain torch inside.

`install()` before Megatron-Core is imported. Constructors take what Megatron gives Transformer Engine 2; parameters carry
its names, shapes and marks. It shows that the layers are put together and named rightly, not that the library computes
what it should. Without tensor parallelism.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

VERSION = "2.6.0"


class WithExtraState(nn.Module):
    """Every layer of the library has one, for fp8 scales; empty without fp8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None: ...


class Linear(WithExtraState):
    def __init__(self, in_features, out_features, *, bias, params_dtype, device, parallel_mode=None, tp_size=1, **_):
        super().__init__()
        assert tp_size == 1 and not bias
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        mark(self.weight, parallel_mode)

    def forward(self, x: torch.Tensor, is_first_microbatch=None) -> torch.Tensor:
        return F.linear(x, self.weight)


class GroupedLinear(WithExtraState):
    """weight0, weight1 ...: [out, in] each"""

    def __init__(self, num_gemms, in_features, out_features, *, bias, params_dtype, device, parallel_mode=None, **_):
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            self.register_parameter(f"weight{i}", weight)
            mark(weight, parallel_mode)

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch=None) -> torch.Tensor:
        """x [n, in], m_splits: tokens of each -> [n, out]"""
        parts = x.split(m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


def mark(weight: nn.Parameter, parallel_mode: str | None) -> None:
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    weight.partition_dim, weight.partition_stride = int(parallel_mode == "row"), 1  # type: ignore[attr-defined]


class RMSNorm(WithExtraState):
    def __init__(self, hidden_size, eps, *, sequence_parallel, params_dtype, device, zero_centered_gamma=False, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Unused(nn.Module):
    """Classes that Megatron derives from when it is imported, and that nothing of ours builds."""

    def __init__(self, *_, **__):
        raise AssertionError("not part of the specification")


def install() -> None:
    te, pytorch = _module("transformer_engine"), _module("transformer_engine.pytorch")
    te.__version__, te.pytorch = VERSION, pytorch
    for name, cls in (("Linear", Linear), ("GroupedLinear", GroupedLinear), ("RMSNorm", RMSNorm)):
        setattr(pytorch, name, cls)
    for name in ("LayerNorm", "LayerNormLinear", "DotProductAttention"):
        setattr(pytorch, name, type(name, (Unused,), {}))
    pytorch.ops = _module("transformer_engine.pytorch.ops")
    pytorch.ops.Sequential = pytorch.ops.FusibleOperation = Unused
    pytorch.tensor = _module("transformer_engine.pytorch.tensor")
    pytorch.tensor.QuantizedTensor = type("QuantizedTensor", (), {})
    pytorch.fp8 = _module("transformer_engine.pytorch.fp8")
    pytorch.fp8.FP8GlobalStateManager = pytorch.fp8.fp8_autocast = Unused
    pytorch.distributed = _module("transformer_engine.pytorch.distributed")
    for name in ("CudaRNGStatesTracker", "activation_recompute_forward", "is_fp8_activation_recompute_enabled"):
        setattr(pytorch.distributed, name, type(name, (Unused,), {}))
    te.common = _module("transformer_engine.common")
    te.common.recipe = _module("transformer_engine.common.recipe")
    te.common.recipe.DelayedScaling = type("DelayedScaling", (), {})


def _module(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # so that a part which is not there is an ImportError
    return module
