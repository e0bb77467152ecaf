"""Which module answers a call. A backend is a module that has the four public functions, without `backend`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

MODULES = {
    "reference": "keye_kernels.dsa.reference",
    "torch": "keye_kernels.dsa.torch_backend",
    "triton": "keye_kernels.dsa.triton_backend",
}


def resolve(backend: str | None, device: torch.device) -> ModuleType:
    """The backend's module; None is Triton on CUDA and torch elsewhere. An impossible choice raises, nothing falls back."""
    if backend is None:
        backend = "triton" if device.type == "cuda" else "torch"
    if backend not in MODULES:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(map(repr, MODULES))}")
    if backend == "triton":
        _require_triton(device)
    return importlib.import_module(MODULES[backend])


def _require_triton(device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "backend: 'triton' needs the package triton, which a CUDA build of torch brings along; "
            "backend='torch' runs on any device"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend: 'triton' needs CUDA tensors, these are on {device}; backend='torch' runs on any device "
            "(TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"
        )
