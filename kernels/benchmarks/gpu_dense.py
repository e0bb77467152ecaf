"""What dense causal attention costs in PyTorch: the fastest of its flash and cuDNN kernels on the same shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_clock import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass
class Dense:
    """Milliseconds of the fastest kernel, and what became of the others."""

    forward: float
    both: float  # forward and backward
    fastest: str
    tried: dict[str, str]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, budget: float) -> Dense:
    """q [T,Hq,D], k and v [T,Hkv,D]. A kernel that refuses grouped heads gets K and V repeated beforehand, untimed."""
    heads = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    timings: dict[str, tuple[float, float]] = {}
    tried: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        for grouped in (True, False):
            label = name if grouped else f"{name}, K and V repeated"
            leaves = list(heads)
            if not grouped:
                leaves[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in heads[1:]]
            leaves = [x.detach().requires_grad_() for x in leaves]
            try:
                timings[label] = _time(leaves, kernel, grouped, budget)
                tried[label] = f"{timings[label][1]:.3f} ms"
                break
            except RuntimeError as error:  # this build or device lacks the kernel
                tried[label] = str(error).splitlines()[0][:200]
    if not timings:
        raise RuntimeError(f"no dense causal attention kernel of PyTorch runs here: {tried}")
    fastest = min(timings, key=lambda label: timings[label][1])
    return Dense(min(forward for forward, _ in timings.values()), timings[fastest][1], fastest, tried)


def _time(leaves: list[Tensor], kernel: SDPBackend, grouped: bool, budget: float) -> tuple[float, float]:
    grad = torch.randn_like(leaves[0])

    def forward() -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    with torch.no_grad():
        once = milliseconds(forward, grad.device, budget / 4)
    return once, milliseconds(both, grad.device, budget)
