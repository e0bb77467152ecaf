"""Where gradients go, and that they are the derivative."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa


@pytest.fixture
def small(make_inputs):
    start, stop = torch.tensor([0, 0, 2, 3, 0]).int(), torch.tensor([1, 5, 2, 7, 7]).int()
    return [x.requires_grad_() for x in make_inputs(5, 7, (4, 2), 3, (2, 4))], start, stop


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_attention_gradcheck(backend, mode, small):
    (q, k, v, *indexer), start, stop = small
    fixed = [x.detach() for x in indexer]
    assert torch.autograd.gradcheck(
        lambda *qkv: dsa.dsa_attention(*qkv, *fixed, start, stop, 3, mode, backend)[0], (q, k, v)
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_indexer_gradcheck(backend, mode, small):
    """kl row by row, so the rows' weights differ: gradcheck probes each output apart."""
    (q, k, v, *indexer), start, stop = small
    fixed = [x.detach() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *parts: dsa.dsa_attention(*fixed, *parts, start, stop, 3, mode, backend)[1], tuple(indexer)
    )


def test_plain_attention_gradcheck(small):
    (q, k, v, *_), start, stop = small
    indices = torch.tensor([[0, -1], [1, 4], [-1, -1], [3, 6], [0, 2]]).int()
    assert torch.autograd.gradcheck(lambda *qkv: dsa.sparse_attention(*qkv, indices)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: dsa.dense_attention(*qkv, start, stop)[0], (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_two_losses_do_not_mix(backend, mode, small):
    """out teaches q, k, v; kl teaches iq, ik, iw; neither reaches the other's."""
    inputs, start, stop = small
    out, kl = dsa.dsa_attention(*inputs, start, stop, 3, mode, backend)
    from_out = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True, allow_unused=True)
    from_kl = torch.autograd.grad(kl.sum(), inputs, allow_unused=True)
    silent = lambda grad: grad is None or not grad.any()  # noqa: E731
    assert [silent(grad) for grad in from_out] == [False] * 3 + [True] * 3
    assert [silent(grad) for grad in from_kl] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_frozen_parts(mode, small, run_all, assert_near):
    """Only the indexer learns, or only attention: the live gradients are those of the full run."""
    inputs, start, stop = small
    detached = [x.detach() for x in inputs]
    _, want = run_all("reference", detached, start, stop, 3, mode)
    generator = torch.Generator().manual_seed(99)
    for live in (slice(0, 3), slice(3, 6)):
        leaves = [x.clone() for x in detached]
        for leaf in leaves[live]:
            leaf.requires_grad_()
        out, kl = dsa.dsa_attention(*leaves, start, stop, 3, mode)
        generator.manual_seed(99)
        grad_out, grad_kl = torch.randn(out.shape, generator=generator), torch.rand(kl.shape, generator=generator)
        ((out * grad_out).sum() + (kl * grad_kl).sum()).backward()
        names = ("q", "k", "v", "iq", "ik", "iw")[live]
        assert_near({n: x.grad for n, x in zip(names, leaves[live])}, {n: want[n] for n in names}, 1e-12)


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_bit_equal_from_run_to_run(mode, layout, make_inputs, run_all):
    num_queries, num_keys, start, stop = layout("packed")
    inputs = make_inputs(num_queries, num_keys)
    _, first = run_all("torch", inputs, start, stop, 9, mode, torch.float32)
    _, again = run_all("torch", inputs, start, stop, 9, mode, torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in first)
