"""The interpreter's bf16: products are right, any other arithmetic is refused instead of wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from keye_kernels.dsa.triton_backend.launch import launch


@pytest.fixture(autouse=True)
def _only_interpreted(interpreted):
    if not interpreted:
        pytest.skip("about the interpreter, and this process compiles")


@triton.jit
def _product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None])
    right = tl.load(b + k[:, None] * N + n[None])
    tl.store(out + m[:, None] * N + n[None], tl.dot(left, right))


@triton.jit
def _twice(a, out, N: tl.constexpr, WIDEN: tl.constexpr):
    x = tl.load(a + tl.arange(0, N))
    if WIDEN:
        x = x.to(tl.float32)
    tl.store(out + tl.arange(0, N), x + x)


@triton.jit
def _sum(a, out, N: tl.constexpr, WIDEN: tl.constexpr):
    x = tl.load(a + tl.arange(0, N))
    if WIDEN:
        x = x.to(tl.float32)
    tl.store(out, tl.sum(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product(dtype, device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((16, 64), (64, 32)))
    out = torch.full((16, 32), torch.nan, device=device)
    launch(_product, (1,), a, b, out, M=16, N=32, K=64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [_twice, _sum], ids=["sum of two", "sum over an axis"])
def test_arithmetic_on_bf16_is_refused(kernel, device):
    x = torch.arange(16, device=device).bfloat16()
    out = torch.full((16,), torch.nan, device=device)
    with pytest.raises(Exception, match="widen to float32"):
        launch(kernel, (1,), x, out, N=16, WIDEN=False)
    launch(kernel, (1,), x, out, N=16, WIDEN=True)
    want = 2 * x.float() if kernel is _twice else x.float().sum()
    assert torch.equal(out if kernel is _twice else out[0], want)


def test_narrowing_to_bf16_rounds_to_nearest_even(device):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, generator=generator) * torch.logspace(-42, 36, 1024)  # subnormals to near the top
    x[:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-12), 0.0, -0.0, torch.inf, 1.7e38, torch.nan])
    out = torch.empty(1024, dtype=torch.bfloat16, device=device)
    launch(_twice, (1,), x.to(device), out, N=1024, WIDEN=True)
    torch.testing.assert_close(out, (2 * x).bfloat16().to(device), rtol=0, atol=0, equal_nan=True)
