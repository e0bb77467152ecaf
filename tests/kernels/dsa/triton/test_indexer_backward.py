"""The way back to the indexer's queries, keys and gates, against autograd in float64.

Gradients are compared by norm: where a product of query and key is 0 to rounding, a ReLU may open on one side and not on
the other, which moves single elements and not their norm.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loss_cases import define, error, make_case, poison, stored_of

from keye_kernels.dsa.triton_backend import indexer_backward as module

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
both = pytest.mark.parametrize("sparse", [True, False], ids=["union", "range"])


def gradients(case, want, deterministic=False, out_dtype=None) -> SimpleNamespace:
    """Of all chunks; rows in no chunk keep the zeros that the caller gave."""
    grad_iq = torch.zeros_like(case.iq, dtype=out_dtype or case.iq.dtype)
    grad_iw = torch.zeros_like(case.iw, dtype=out_dtype or case.iw.dtype)
    grad_ik = torch.zeros_like(case.ik, dtype=FP32)
    for chunk in case.chunks:
        grad_iq[chunk.rows] = torch.nan
        grad_iw[chunk.rows] = torch.nan
        d_scores = stored_of(case, want.d_scores, chunk)
        with poison():
            module.indexer_backward(
                d_scores, case.iq, case.ik, case.iw, case.windows, chunk, grad_iq, grad_iw, grad_ik, case.union(chunk),
                deterministic,
            )  # fmt: skip
    return SimpleNamespace(d_iq=grad_iq, d_ik=grad_ik, d_iw=grad_iw)


def assert_near(got, want, tolerance: float) -> None:
    for name in ("d_iq", "d_ik", "d_iw"):
        assert error(getattr(got, name), getattr(want, name)) < tolerance, name


@both
@pytest.mark.parametrize(
    "name, pairs", [("packed", None), ("ragged", 1500), ("tail", 1700), ("more-queries", None), ("causal", 2000)]
)
def test_gradients_are_autograd(device, layout, name, pairs, sparse):
    case = make_case(layout, name, device, sparse, pairs=pairs)
    want = define(case)
    assert (pairs is None) == (len(case.chunks) == 1)
    assert_near(gradients(case, want), want, 2e-6)
    if sparse:
        assert_near(gradients(case, want, deterministic=True), want, 2e-6)


@both
@pytest.mark.parametrize(
    "indexer, dtype",
    [((16, 64), BF16), ((3, 16), BF16), ((4, 32), BF16), ((4, 32), FP16), ((20, 128), BF16), ((3, 24), FP32)],
)
def test_every_shape_of_indexer(device, layout, indexer, dtype, sparse):
    """Gates are positive and negative. Float32 outputs, so that what is measured is the rounding inside: bf16's for 16 bits."""
    case = make_case(layout, "ragged", device, sparse, dtype, indexer=indexer)
    want = define(case)
    assert_near(gradients(case, want, out_dtype=FP32), want, 2e-6 if dtype == FP32 else 4e-3)


def test_half_precision_keeps_small_gradients(device, layout):
    """A gradient of 1e-9 a score is nothing in float16; it must reach the keys all the same."""
    case = make_case(layout, "causal", device, True, FP16)
    want = define(case)
    small = SimpleNamespace(**{name: getattr(want, name) * 1e-8 for name in ("d_scores", "d_iq", "d_ik", "d_iw")})
    assert_near(gradients(case, small, out_dtype=FP32), small, 4e-3)


@both
def test_the_keys_of_a_block_in_several_programs(device, layout, sparse, monkeypatch):
    case = make_case(layout, "ragged", device, sparse, pairs=1500, topk=50)
    want = define(case)
    monkeypatch.setattr(module, "KEYS_PER_PROGRAM", 16)
    assert_near(gradients(case, want), want, 2e-6)
    if sparse:
        assert_near(gradients(case, want, deterministic=True), want, 2e-6)


@both
def test_a_row_that_sees_nothing_has_no_gradient(device, layout, sparse):
    case = make_case(layout, "ragged", device, sparse)
    got = gradients(case, define(case))
    blind = ~case.mask.any(-1)
    assert blind.sum() >= 4
    assert (got.d_iq[blind] == 0).all()
    assert (got.d_iw[blind] == 0).all()


def test_deterministic_twice_and_in_pieces(device, layout, monkeypatch):
    """Bit for bit, also when the workspace holds a block at a time."""
    case = make_case(layout, "packed", device, True, BF16, indexer=(16, 64))
    want = define(case)
    first, second = gradients(case, want, True), gradients(case, want, True)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    pieces = gradients(case, want, True)
    for name in ("d_iq", "d_ik", "d_iw"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert_near(pieces, want, 4e-3 * 2)
    again = gradients(case, want, True)
    assert all(torch.equal(getattr(pieces, name), getattr(again, name)) for name in ("d_iq", "d_ik", "d_iw"))
