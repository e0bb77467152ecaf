"""sparse_attention and dense_attention on Triton against the definition, whichever way their keys are read."""

from __future__ import annotations

import logging

import pytest
import torch

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend import blocks, plain, views

TOLERANCE = 6e-3  # fp16 values and gradients, of their norm


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", 32 * 80)
    monkeypatch.setattr(blocks, "ROWS_PER_CHUNK", 48)


@pytest.fixture
def check(device, make_inputs):
    def run(operator, num_queries, num_keys, *marks, **options):
        inputs = [x.half() for x in make_inputs(num_queries, num_keys)[:3]]
        exact = [x.double().requires_grad_() for x in inputs]
        leaves = [x.to(device).requires_grad_() for x in inputs]
        want, want_lse = getattr(reference, operator)(*exact, *marks)
        got, lse = getattr(plain, operator)(*leaves, *(x.to(device) for x in marks), **options)
        assert got.dtype == torch.float16
        assert not lse.requires_grad
        torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-4, atol=1e-4)
        upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).half()
        pairs = [(got, want)]
        got.backward(upstream.to(device).transpose(0, 1).contiguous().transpose(0, 1))  # of strides of its own
        want.backward(upstream.double())
        for value, expected in [*pairs, *((x.grad, y.grad) for x, y in zip(leaves, exact))]:
            assert torch.isfinite(value).all()
            assert (value.cpu().double() - expected).norm() <= TOLERANCE * expected.norm()

    return run


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["contiguous", "gathered"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("name", ["packed", "ragged", "more-queries"])
def test_sparse(name, deterministic, share, layout, make_inputs, check, monkeypatch, caplog):
    """Both ways; backward rebuilds what the contiguous one reads from the union that was kept."""
    monkeypatch.setattr(views, "CONTIGUOUS_SHARE", share)
    num_queries, num_keys, start, stop = layout(name)
    indices = reference.select_topk(*make_inputs(num_queries, num_keys)[3:], start, stop, 7)
    with caplog.at_level(logging.DEBUG, logger="keye_kernels.dsa"):
        check("sparse_attention", num_queries, num_keys, indices, deterministic=deterministic)
    assert {line.split(": ")[-1] for line in caplog.messages} == {"words" if share == 0 else "union"}


@pytest.mark.parametrize("name", ["causal", "packed", "ragged", "blind"])
def test_dense(name, layout, check):
    num_queries, num_keys, start, stop = layout(name)
    check("dense_attention", num_queries, num_keys, start, stop)


@pytest.mark.parametrize("columns", [0, 3])
def test_no_keys_listed(columns, check):
    check("sparse_attention", 20, 30, torch.full((20, columns), -1, dtype=torch.int32))


def test_words_of_a_union(make_case):
    case = make_case("ragged", 0.3)
    for union, words in zip(case.views("union"), case.views("words")):
        got = views.words_from_union(union.union, union.chunk)
        for block in range(union.chunk.num_blocks):
            low, high = case.windows[:, union.chunk.rows.start // 16 + block] - union.chunk.keys.start
            assert torch.equal(got[block, low:high], words.words[block, low:high])


def test_contiguous_above_half_of_the_windows():
    chunk = blocks.Chunk(slice(0, 32), slice(0, 100), window_entries=150)
    assert [views.prefers_contiguous(entries, chunk) for entries in (0, 75, 76, 150)] == [False, False, True, True]
