"""The fp8 imitation: what is representable, what the transform leaves alone, what the gradient sees."""

from __future__ import annotations

import torch

from keye_kernels import dsa
from keye_kernels.dsa.quantise import fake_fp8, hadamard


def test_hadamard_is_orthonormal_and_symmetric():
    matrix = hadamard(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * 0.5**0.5
    torch.testing.assert_close(hadamard(torch.eye(4, dtype=torch.float64)), torch.kron(two, two))


def test_values_are_e4m3_times_one_power_of_two_per_vector():
    x = torch.randn(50, 4, 32, dtype=torch.float64) * torch.logspace(-6, 6, 50, dtype=torch.float64)[:, None, None]
    y, exact = fake_fp8(x), hadamard(x)
    peak = exact.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(peak / 448)))  # the least power of two that brings the peak within range
    codes = y / scale
    assert torch.equal(codes.to(torch.float8_e4m3fn).double(), codes)
    assert (codes.abs().amax(-1) > 448 / 2 * (1 - 2**-4)).all()  # a smaller scale would not do
    assert (
        (y - exact).abs() <= torch.maximum(exact.abs() * 2**-4, scale * 2**-10)
    ).all()  # half a step of 3 mantissa bits
    assert (y != exact).any()


def test_edges():
    assert torch.equal(fake_fp8(torch.zeros(2, 8)), torch.zeros(2, 8))
    spike = torch.zeros(1, 4)
    spike[0, 0] = 448 * 2  # each transformed value is exactly 448
    assert torch.equal(fake_fp8(spike), torch.full((1, 4), 448.0))
    widest = torch.tensor(
        [[448.0, 2.0**-9, 0, 0]], dtype=torch.float64
    )  # from e4m3's greatest to its least: scale 1 alone holds both
    assert torch.equal(fake_fp8(hadamard(widest)), widest)
    assert fake_fp8(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_gradient_passes_straight_through():
    x, g = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(5, 16, dtype=torch.float64)
    fake_fp8(x).backward(g)
    torch.testing.assert_close(x.grad, hadamard(g))


def test_backends_agree_and_differ_from_unquantised(layout, make_inputs, run_all, assert_near):
    num_queries, num_keys, start, stop = layout("causal")
    inputs = make_inputs(num_queries, num_keys)
    indices, want = run_all("reference", inputs, start, stop, 13, fake_fp8=True)
    chosen, got = run_all("torch", inputs, start, stop, 13, fake_fp8=True)
    plain, _ = run_all("torch", inputs, start, stop, 13)
    assert torch.equal(chosen, indices)
    assert torch.equal(chosen, dsa.select_topk(*inputs[3:], start, stop, 13, fake_fp8=True))
    assert_near(got, want, 1e-12)
    assert not torch.equal(chosen, plain)
