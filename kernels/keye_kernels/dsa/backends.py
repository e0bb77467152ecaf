"""Which module answers a call. A backend is a module that has the four public functions, without `backend`."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

MODULES = {
    "reference": "keye_kernels.dsa.reference",
    "torch": "keye_kernels.dsa.torch_backend",
    "triton": "keye_kernels.dsa.triton_backend",
}


def resolve(backend: str | None, device: torch.device) -> ModuleType:
    """The backend's module; None is Triton on CUDA and torch elsewhere. An impossible choice raises."""
    if backend is None:
        backend = "triton" if device.type == "cuda" else "torch"
    if backend not in MODULES:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(map(repr, MODULES))}")
    module = MODULES[backend]
    if importlib.util.find_spec(module) is None:
        raise NotImplementedError(f"backend: {backend!r} is not built yet; ask for backend='torch' (any device)")
    return importlib.import_module(module)
