"""Bit for bit the same: run again, without gradients, recomputed, alone instead of among others."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from keye_kernels import dsa

TOPK = 12


@pytest.fixture
def case(layout, make_inputs, device):
    """bf16 leaves and ranges, over documents."""
    num_queries, num_keys, start, stop = layout("packed")
    inputs = [x.to(device, torch.bfloat16).requires_grad_() for x in make_inputs(num_queries, num_keys)]
    return inputs, (start.to(device), stop.to(device))


def run(inputs, ranges, mode="sparse", **options):
    return dsa.dsa_attention(*inputs, *ranges, TOPK, mode, "triton", return_indices=True, **options)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_forward(mode, case):
    """Again, and without gradients; the selection is that of select_topk."""
    inputs, ranges = case
    first = run(inputs, ranges, mode)
    assert same(first, run(inputs, ranges, mode))
    with torch.no_grad():
        assert same(first, run(inputs, ranges, mode))
    assert torch.equal(first[2], dsa.select_topk(*inputs[3:], *ranges, TOPK, "triton"))


def test_selection_does_not_depend_on_the_cut(case, chunks_of_pairs):
    inputs, ranges = case
    first = run(inputs, ranges)
    chunks_of_pairs(16 * 60)
    again = run(inputs, ranges)
    assert torch.equal(first[2], again[2])


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_deterministic_backward(mode, case):
    """Twice, and once more under activation checkpointing, which runs the forward again inside the backward."""
    inputs, ranges = case
    results = []
    for recompute in (False, False, True):
        for leaf in inputs:
            leaf.grad = None
        call = lambda *leaves: run(leaves, ranges, mode, deterministic=True)  # noqa: E731
        out, kl, _ = checkpoint(call, *inputs, use_reentrant=False) if recompute else call(*inputs)
        (out.float().square().sum() + kl.sum()).backward()
        results.append([out.detach(), kl.detach(), *(leaf.grad for leaf in inputs)])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_plain_attention(case):
    (q, k, v, *indexer), ranges = case
    indices = dsa.select_topk(*indexer, *ranges, TOPK, "triton")
    gradients = []
    for _ in range(2):
        out, lse = dsa.sparse_attention(q, k, v, indices, backend="triton", deterministic=True)
        dense, dense_lse = dsa.dense_attention(q, k, v, *ranges, backend="triton")
        total = out.float().square().sum() + dense.float().square().sum()
        gradients.append([out, lse, dense, dense_lse, *torch.autograd.grad(total, (q, k, v))])
    assert same(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_decode_step_chooses_as_the_full_forward(dtype, layout, make_inputs, device):
    """One query alone, at the last of its keys, against the same row in the whole pass: exact, ties included."""
    num_queries, num_keys, start, stop = (x if isinstance(x, int) else x.to(device) for x in layout("causal"))
    _, _, _, iq, ik, iw = (x.to(device, dtype) for x in make_inputs(num_queries, num_keys))
    ik[40] = ik[11]  # exactly tied for every query
    whole = dsa.select_topk(iq, ik, iw, start, stop, TOPK, "triton")
    for t in (0, 11, 12, 40, 63, 82):
        row = slice(t, t + 1)
        one = dsa.select_topk(iq[row], ik[: t + 1], iw[row], start[row], stop[row], TOPK, "triton")
        assert torch.equal(one[0], whole[t]), t
