"""The public operators on Triton against the float64 definition: values and every gradient, at shapes where nothing divides.

Gradients are compared by norm: where a head's agreement is within rounding of 0 its ReLU may flip, and moves single elements.
"""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa

LAYOUTS = ["causal", "tail", "packed", "more-queries", "ragged", "blind"]
HEADS = [
    ((1, 1), 32, (4, 32)),
    ((4, 2), 64, (16, 64)),
    ((4, 1), 128, (4, 32)),
    ((8, 1), 32, (1, 8)),
    ((16, 2), 40, (3, 24)),
]
TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 5e-3,
}  # gradients of narrow scores pass through bf16


@pytest.fixture
def check(run_all, assert_near, device):
    """Forward and backward on Triton in `dtype` against the definition on the same values."""

    def run(inputs, start, stop, topk, mode="sparse", dtype=torch.float32, **options):
        inputs = [x.to(dtype).double() for x in inputs]
        indices, want = run_all("reference", inputs, start, stop, topk, mode, scale=options.get("scale"))
        chosen, got = run_all("triton", inputs, start, stop, topk, mode, dtype, device, **options)
        assert torch.equal(chosen, indices)
        assert got["out"].dtype == dtype
        assert got["kl"].dtype == torch.float32
        assert_near(got, want, TOLERANCE[dtype])

    return run


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, mode, chunks_of_pairs, layout, make_inputs, check):
    num_queries, num_keys, start, stop = layout(name)
    chunks_of_pairs(4000)  # of two or three blocks
    check(make_inputs(num_queries, num_keys), start, stop, 13, mode)


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_types(dtype, mode, layout, make_inputs, check):
    num_queries, num_keys, start, stop = layout("packed")
    check(make_inputs(num_queries, num_keys), start, stop, 13, mode, dtype)


@pytest.mark.parametrize(("heads", "dim", "indexer"), HEADS)
def test_heads(heads, dim, indexer, layout, make_inputs, check):
    num_queries, num_keys, start, stop = layout("tail")
    check(make_inputs(num_queries, num_keys, heads, dim, indexer), start, stop, 9, scale=0.3)


@pytest.mark.parametrize("topk", [40, 41, 42, 200])
def test_topk_around_the_visible_count(topk, layout, make_inputs, check):
    """Rows see up to 41 keys of S = 41: one fewer, as many, one more, and far more than S."""
    num_queries, num_keys, start, stop = layout("more-queries")
    check(make_inputs(num_queries, num_keys), start, stop, topk)


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_deterministic_backward_and_serving_scores(mode, layout, make_inputs, run_all, assert_near, device):
    num_queries, num_keys, start, stop = layout("packed")
    inputs = [x.float().double() for x in make_inputs(num_queries, num_keys)]
    indices, want = run_all("reference", inputs, start, stop, 13, mode, fake_fp8=True)
    options = dict(dtype=torch.float32, device=device, fake_fp8=True, deterministic=True)
    chosen, got = run_all("triton", inputs, start, stop, 13, mode, **options)
    assert torch.equal(chosen, indices)
    assert_near(got, want, 2e-5)


def test_selection_exact_on_integers(layout, device):
    """Small integers: every sum is exact, equal scores abound, and the lower index wins them."""
    generator = torch.Generator().manual_seed(3)
    for name in ("ragged", "causal"):
        num_queries, num_keys, start, stop = layout(name)
        shapes = [(num_queries, 4, 8), (num_keys, 8), (num_queries, 4)]
        inputs = [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]
        want = dsa.select_topk(*inputs, start, stop, 17, "reference")
        got = dsa.select_topk(*(x.to(device) for x in inputs), start.to(device), stop.to(device), 17, "triton")
        assert torch.equal(got.cpu(), want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operator", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["ragged", "packed"])
def test_plain_attention(name, operator, dtype, layout, make_inputs, assert_near, device):
    num_queries, num_keys, start, stop = layout(name)
    inputs = [x.to(dtype).double() for x in make_inputs(num_queries, num_keys)]
    marks = (start, stop) if operator == "dense" else (dsa.select_topk(*inputs[3:], start, stop, 11),)
    function = dsa.dense_attention if operator == "dense" else dsa.sparse_attention
    results = []
    for backend, kind, place in (("reference", torch.float64, "cpu"), ("triton", dtype, device)):
        leaves = [x.to(place, kind, copy=True).requires_grad_() for x in inputs[:3]]
        out, lse = function(*leaves, *(x.to(place) for x in marks), backend=backend)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        assert not lse.requires_grad
        assert (lse.cpu()[start == stop] == -torch.inf).all()
        seen = lse.cpu().masked_fill((start == stop)[:, None], 0)
        tensors = (out.detach(), seen, *(x.grad for x in leaves))
        results.append({name: x.cpu() for name, x in zip(["out", "lse", "q", "k", "v"], tensors)})
    assert results[1]["lse"].dtype == torch.float32
    assert_near({"lse": results[1].pop("lse")}, {"lse": results[0].pop("lse")}, 1e-5)
    assert_near(results[1], results[0], TOLERANCE[dtype])


def test_rows_that_see_nothing(layout, make_inputs, run_all, device):
    num_queries, num_keys, start, stop = layout("ragged")
    blind = start == stop
    for mode in ("sparse", "warmup"):
        inputs = make_inputs(num_queries, num_keys)
        indices, got = run_all("triton", inputs, start, stop, 6, mode, torch.float32, device)
        assert (indices[blind] == -1).all()
        for name in ("out", "kl", "q", "iq", "iw"):
            assert (got[name][blind] == 0).all(), (mode, name)
            assert (got[name][~blind] != 0).any(), (mode, name)


def test_no_queries(make_inputs, device):
    inputs = [x.float().to(device) for x in make_inputs(0, 7)]
    none = torch.zeros(0, dtype=torch.int32, device=device)
    out, kl, indices = dsa.dsa_attention(*inputs, none, none, 3, backend="triton", return_indices=True)
    assert (out.shape, kl.shape, indices.shape) == ((0, 4, 32), (0,), (0, 3))
    assert dsa.dense_attention(*inputs[:3], none, none, backend="triton")[1].shape == (0, 4)
    assert dsa.sparse_attention(*inputs[:3], indices, backend="triton")[0].shape == (0, 4, 32)


def test_a_nan_shows_in_the_loss(make_inputs, device):
    """A broken key is chosen rather than hidden, so that the loss tells."""
    inputs = [x.float().to(device) for x in make_inputs(20, 20)]
    inputs[4][3] = torch.nan
    start, stop = (
        torch.zeros(20, dtype=torch.int32, device=device),
        torch.full((20,), 20, dtype=torch.int32, device=device),
    )
    _, kl, indices = dsa.dsa_attention(*inputs, start, stop, 4, backend="triton", return_indices=True)
    assert (indices == 3).any(-1).all()
    assert kl.isnan().all()
