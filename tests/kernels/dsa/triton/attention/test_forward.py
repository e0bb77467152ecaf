"""The forward kernel against the float64 definition, from each of its three sources of keys."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend.attention_forward import forward

# Of out, relative to its norm: rounding of the weights and of the result to the inputs' type. lse is float32 throughout.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
HEADS = [
    ((1, 1), torch.bfloat16), ((4, 2), torch.bfloat16), ((6, 2), torch.float32), ((6, 2), torch.bfloat16),
    ((8, 2), torch.float16), ((16, 2), torch.bfloat16), ((12, 1), torch.float16), ((4, 2), torch.float32),
]  # fmt: skip
SOURCES = [("union", 0.2), ("union", 1), ("words", 0.2), ("words", 1), ("range", 1)]


@pytest.fixture
def check(device, make_inputs, make_case):
    def run(arrangement, source, share, heads=(4, 2), dim=32, dtype=torch.float32, scale=0.3):
        case = make_case(arrangement, share)
        q, k, v = (x.to(dtype) for x in make_inputs(case.T, case.S, heads, dim)[:3])
        want, want_lse, _ = reference._attend(q.double(), k.double(), v.double(), case.mask, scale)
        out = torch.full_like(q, torch.nan, device=device)
        lse = torch.full(q.shape[:2], torch.nan, device=device)
        for view in case.views(source):
            forward(q.to(device), k.to(device), v.to(device), scale, view, out, lse)
        rows = torch.zeros(case.T, dtype=torch.bool)
        for chunk in case.chunks:
            rows[chunk.rows] = True
        assert out[~rows.to(device)].isnan().all(), "rows outside the chunks were written"
        out, lse = out.cpu()[rows].double(), lse.cpu()[rows].double()
        assert torch.isfinite(out).all()
        error = (out - want[rows]).norm() / want[rows].norm().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype], f"relative error of out {error:.1e}"
        torch.testing.assert_close(lse, want_lse[rows], rtol=1e-5, atol=1e-5)
        blind = ~case.mask[rows].any(1)
        assert not out[blind].any()
        assert (lse[blind] == -torch.inf).all()

    return run


@pytest.mark.parametrize("arrangement", ["causal", "tail", "packed", "more-queries", "ragged"])
@pytest.mark.parametrize(("source", "share"), SOURCES)
def test_arrangements(arrangement, source, share, check):
    check(arrangement, source, share, dtype=torch.float16)


@pytest.mark.parametrize(("heads", "dtype"), HEADS)
def test_heads(heads, dtype, check):
    """Query heads a KV head: 1, 2, 3, 4, 8 and 12, which is more than a program holds (in float32, 3 is)."""
    check("packed", "union", 0.3, heads=heads, dtype=dtype)
    check("tail", "range", 1, heads=heads, dtype=dtype)


@pytest.mark.parametrize("dim", [8, 64, 72, 128, 136])
@pytest.mark.parametrize(("source", "share"), SOURCES[1:])
def test_dims(dim, source, share, check):
    check("ragged", source, share, dim=dim, dtype=torch.bfloat16, scale=dim**-0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_must_be_positive(scale, check):
    with pytest.raises(ValueError, match="scale"):
        check("causal", "range", 1, scale=scale)


def test_dim_above_512_is_refused(check):
    with pytest.raises(ValueError, match="head dim 520"):
        check("causal", "range", 1, dim=520)
