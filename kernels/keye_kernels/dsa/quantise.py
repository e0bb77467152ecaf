"""What serving does to the indexer's query and key before their product, for training that wants to feel it.

Hadamard transform (orthonormal, so by itself it changes no score), then e4m3 with one power-of-two scale per vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything narrower is summed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def hadamard(x: Tensor) -> Tensor:
    """[..., N] -> [..., N], orthonormal Walsh-Hadamard transform (Sylvester order); N is a power of two."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"fake_fp8: the indexer's head dim must be a power of two, got {n}")
    y, half = x, 1
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return y.reshape(x.shape) * n**-0.5


class _StraightThroughE4M3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # amax / 448 = m * 2^e with m in [0.5, 1): the least power of two that is not below it is 2^e, or 2^(e-1) when m = 0.5.
        mantissa, exponent = torch.frexp(x.abs().amax(-1, keepdim=True) / E4M3_MAX)
        exponent = exponent - (mantissa == 0.5).int()
        return torch.ldexp(torch.ldexp(x, -exponent).to(torch.float8_e4m3fn).to(x.dtype), exponent)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def fake_fp8(x: Tensor) -> Tensor:
    """[..., N] any float -> the transformed, quantised values in the accumulation dtype; straight-through gradient."""
    return _StraightThroughE4M3.apply(hadamard(x.to(accumulate_dtype(x))))
