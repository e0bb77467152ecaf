"""The torch backend against the float64 definition: values and every gradient, at shapes where nothing divides."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa.torch_backend import chunks

LAYOUTS = ["causal", "tail", "packed", "long-packed", "more-queries", "ragged", "blind"]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5)]
HEADS = [
    ((1, 1), 32, (4, 32)),
    ((4, 2), 64, (16, 64)),
    ((4, 1), 128, (4, 32)),
    ((8, 1), 32, (1, 8)),
    ((16, 2), 32, (3, 16)),
]


@pytest.fixture(params=[2**19, 600], ids=["one-chunk", "many-chunks"])
def chunked(request, monkeypatch):
    """The same work in one chunk and in many ragged ones."""
    monkeypatch.setattr(chunks, "PAIRS_PER_CHUNK", request.param)
    monkeypatch.setattr(chunks, "ROWS", (3, 256))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, mode, dtype, tolerance, chunked, layout, make_inputs, run_all, assert_near):
    num_queries, num_keys, start, stop = layout(name)
    inputs = make_inputs(num_queries, num_keys)
    indices, want = run_all("reference", inputs, start, stop, 13, mode)
    chosen, got = run_all("torch", inputs, start, stop, 13, mode, dtype)
    assert torch.equal(chosen, indices)
    assert_near(got, want, tolerance)


@pytest.mark.parametrize(("heads", "dim", "indexer"), HEADS)
def test_heads(heads, dim, indexer, layout, make_inputs, run_all, assert_near):
    num_queries, num_keys, start, stop = layout("packed")
    inputs = make_inputs(num_queries, num_keys, heads, dim, indexer)
    indices, want = run_all("reference", inputs, start, stop, 9, scale=0.3)
    chosen, got = run_all("torch", inputs, start, stop, 9, scale=0.3)
    assert torch.equal(chosen, indices)
    assert_near(got, want, 1e-12)


@pytest.mark.parametrize("topk", [1, 40, 41, 42, 200])
def test_topk_around_the_visible_count(topk, layout, make_inputs, run_all, assert_near):
    """Query rows see up to 41 keys of S = 41: one fewer, as many, one more, and far more than S."""
    num_queries, num_keys, start, stop = layout("more-queries")
    inputs = make_inputs(num_queries, num_keys)
    indices, want = run_all("reference", inputs, start, stop, topk)
    chosen, got = run_all("torch", inputs, start, stop, topk)
    assert chosen.shape == (num_queries, topk)
    assert torch.equal(chosen, indices)
    assert_near(got, want, 1e-12)


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_bfloat16(mode, layout, make_inputs, run_all, assert_near):
    """Same bf16 values in both; the sums are float32, so only the results' rounding is left."""
    num_queries, num_keys, start, stop = layout("causal")
    inputs = [x.bfloat16().double() for x in make_inputs(num_queries, num_keys)]
    indices, want = run_all("reference", inputs, start, stop, 13, mode)
    chosen, got = run_all("torch", inputs, start, stop, 13, mode, torch.bfloat16)
    assert torch.equal(chosen, indices)
    assert got["out"].dtype == torch.bfloat16
    assert got["kl"].dtype == torch.float32
    assert_near({"kl": got.pop("kl")}, {"kl": want.pop("kl")}, 1e-5)
    assert_near(got, want, 4e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("operator", ["sparse", "dense"])
def test_plain_attention(operator, name, dtype, tolerance, chunked, layout, make_inputs, assert_near):
    num_queries, num_keys, start, stop = layout(name)
    inputs = make_inputs(num_queries, num_keys)
    marks = (start, stop) if operator == "dense" else (dsa.select_topk(*inputs[3:], start, stop, 11),)
    function = dsa.dense_attention if operator == "dense" else dsa.sparse_attention
    results = []
    for backend, kind in (("reference", torch.float64), ("torch", dtype)):
        leaves = [x.to(kind).clone().requires_grad_() for x in inputs[:3]]
        out, lse = function(*leaves, *marks, backend=backend)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind))
        assert not lse.requires_grad
        assert lse.dtype == kind
        blind = start == stop
        assert (lse[blind] == -torch.inf).all()
        seen = lse.masked_fill(blind[:, None], 0)
        results.append(dict(zip(["out", "lse", "q", "k", "v"], (out.detach(), seen, *(x.grad for x in leaves)))))
    assert_near(results[1], results[0], tolerance)


def test_rows_that_see_nothing(layout, make_inputs, run_all):
    num_queries, num_keys, start, stop = layout("ragged")
    blind = start == stop
    assert blind.sum() >= 4
    for backend in ("reference", "torch"):
        for mode in ("sparse", "warmup"):
            indices, got = run_all(backend, make_inputs(num_queries, num_keys), start, stop, 6, mode)
            assert (indices[blind] == -1).all()
            for name in ("out", "kl", "q", "iq", "iw"):
                assert (got[name][blind] == 0).all(), (backend, mode, name)
                assert (got[name][~blind] != 0).any(), (backend, mode, name)


def test_all_keys_selected_is_dense_attention(layout, make_inputs, run_all, assert_near):
    num_queries, num_keys, start, stop = layout("packed")
    inputs = make_inputs(num_queries, num_keys)
    _, sparse = run_all("torch", inputs, start, stop, num_keys)
    _, warmup = run_all("torch", inputs, start, stop, num_keys, "warmup")
    dense, _ = dsa.dense_attention(*inputs[:3], start, stop)
    assert_near(sparse, warmup, 1e-12)
    assert_near({"out": dense}, {"out": sparse["out"]}, 1e-12)


def test_no_queries(make_inputs):
    inputs = make_inputs(0, 7)
    none = torch.zeros(0, dtype=torch.int32)
    for backend in ("reference", "torch"):
        out, kl, indices = dsa.dsa_attention(*inputs, none, none, 3, backend=backend, return_indices=True)
        assert (out.shape, kl.shape, indices.shape) == ((0, 4, 32), (0,), (0, 3))
        assert dsa.dense_attention(*inputs[:3], none, none, backend=backend)[1].shape == (0, 4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_without_the_loss_the_output_is_the_same_to_the_last_bit(mode, backend, layout, make_inputs):
    num_queries, num_keys, start, stop = layout("packed")
    inputs = make_inputs(num_queries, num_keys)
    out, _ = dsa.dsa_attention(*inputs, start, stop, 9, mode, backend)
    same, kl = dsa.dsa_attention(*inputs, start, stop, 9, mode, backend, return_kl=False)
    assert kl is None
    assert torch.equal(out, same)
