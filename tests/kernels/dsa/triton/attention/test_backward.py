"""The backward kernels against autograd of the float64 definition, from each source of keys."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend import union_backward as union_module
from keye_kernels.dsa.triton_backend.contiguous_backward import contiguous_backward
from keye_kernels.dsa.triton_backend.delta import delta
from keye_kernels.dsa.triton_backend.union_backward import union_backward

# Of each gradient, relative to its norm; the probabilities and their gradients are rounded to the inputs' type.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
HEADS = [
    ((1, 1), torch.bfloat16), ((4, 2), torch.bfloat16), ((6, 2), torch.float32), ((6, 2), torch.bfloat16),
    ((8, 2), torch.float16), ((16, 2), torch.bfloat16), ((12, 1), torch.float16), ((4, 2), torch.float32),
]  # fmt: skip
PATHS = [("union", 0.2), ("union in order", 0.2), ("words", 0.2), ("range", 1)]


@pytest.fixture
def gradients(device, make_inputs, make_case):
    """(got, want): the gradients of q, k, v in the kernels' dtypes and in float64."""

    def run(arrangement, path, share, heads=(4, 2), dim=32, dtype=torch.float32, scale=0.3):
        case = make_case(arrangement, share)
        leaves = [x.to(dtype) for x in make_inputs(case.T, case.S, heads, dim)[:3]]
        grad_out = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = [x.double().requires_grad_() for x in leaves]
        out, lse, _ = reference._attend(exact[0], exact[1], exact[2], case.mask, scale)
        want = torch.autograd.grad(out, exact, grad_out.double())

        q, k, v, grad, out, lse = (
            x.detach().to(device).contiguous() for x in (*leaves, grad_out, out.to(dtype), lse.float())
        )
        rows = delta(out, grad)
        torch.testing.assert_close(rows, (out.float() * grad.float()).sum(-1), rtol=1e-4, atol=1e-5)
        grad_q = torch.full_like(q, torch.nan)
        grad_k, grad_v = (torch.zeros(k.shape, device=device) for _ in range(2))
        for view in case.views(path.split()[0]):
            arguments = (grad, q, k, v, lse, rows, scale, view, grad_q, grad_k, grad_v)
            if path.startswith("union"):
                union_backward(*arguments, deterministic=path == "union in order")
            else:
                contiguous_backward(*arguments)
        return [x.cpu() for x in (grad_q, grad_k, grad_v)], want

    return run


@pytest.fixture
def check(gradients):
    def run(*arguments, dtype=torch.float32, **options):
        got, want = gradients(*arguments, dtype=dtype, **options)
        for name, value, expected in zip("qkv", got, want):
            assert torch.isfinite(value).all(), name
            error = (value.double() - expected).norm() / expected.norm()
            assert error <= TOLERANCE[dtype], f"grad of {name}: relative error {error:.1e}"

    return run


@pytest.mark.parametrize("arrangement", ["causal", "tail", "packed", "more-queries", "ragged"])
@pytest.mark.parametrize(("path", "share"), PATHS)
def test_arrangements(arrangement, path, share, check):
    check(arrangement, path, share, dtype=torch.float16)


@pytest.mark.parametrize(("heads", "dtype"), HEADS)
def test_heads(heads, dtype, check):
    """Query heads a KV head: 1, 2, 3, 4, 8 and 12, which is more than a program holds (in float32, 3 is)."""
    check("packed", "union", 0.3, heads=heads, dtype=dtype)
    check("tail", "range", 1, heads=heads, dtype=dtype)


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize(("path", "share"), PATHS)
def test_dims(dim, path, share, check):
    check("ragged", path, share, dim=dim, dtype=torch.bfloat16, scale=dim**-0.5)


@pytest.mark.parametrize("dim", [8, 136])
@pytest.mark.parametrize(("path", "share"), [PATHS[0], PATHS[3]])
def test_odd_dims(dim, path, share, check):
    check("ragged", path, share, dim=dim, dtype=torch.bfloat16, scale=dim**-0.5)


@pytest.mark.parametrize(("path", "share"), PATHS[1:])
def test_same_bits_twice(path, share, gradients, monkeypatch):
    """A workspace of a block at a time, too: its cuts depend on the selection alone."""
    monkeypatch.setattr(union_module, "WORKSPACE_BYTES", 1)
    first, want = gradients("packed", path, share, dtype=torch.bfloat16)
    second, _ = gradients("packed", path, share, dtype=torch.bfloat16)
    assert all(map(torch.equal, first, second))
    for value, expected in zip(first, want):
        assert (value.double() - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()
