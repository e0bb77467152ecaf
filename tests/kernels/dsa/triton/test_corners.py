"""Calls at the edge of the contract: ranges that lie oddly or stand oddly in memory, what autograd keeps and allows."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.utils.checkpoint

from keye_kernels import dsa
from keye_kernels.dsa.triton_backend import fused

SHAPES = dict(heads=(2, 1), dim=16, indexer=(2, 16))


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_whole_blocks_of_empty_ranges_far_from_the_first_key(mode, make_inputs, run_all, assert_near, device):
    """Blocks 1 and 2 see nothing, and their ranges are empty at key 150: padding of a later row of a batch."""
    inputs = make_inputs(64, 200, **SHAPES)
    start, stop = torch.zeros(64, dtype=torch.int32), torch.full((64,), 170, dtype=torch.int32)
    start[16:48] = stop[16:48] = 150
    _, want = run_all("reference", inputs, start, stop, 7, mode)
    _, got = run_all("triton", inputs, start, stop, 7, mode, torch.float32, device)
    assert_near(got, want, 2e-5)
    for name in ("out", "kl", "q", "iq", "iw"):
        assert (got[name][16:48] == 0).all(), name


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_ranges_that_are_not_contiguous(layout, make_inputs, device):
    inputs = [x.float().to(device) for x in make_inputs(40, 40, **SHAPES)]
    stop = torch.arange(1, 41, dtype=torch.int32, device=device)
    if layout == "strided":
        start, stop = torch.stack((torch.zeros_like(stop), stop), -1).unbind(-1)
    else:
        start = stop.new_zeros(1).expand(40)
    want = dsa.select_topk(*inputs[3:], start, stop, 5, backend="reference")
    assert torch.equal(dsa.select_topk(*inputs[3:], start, stop, 5, backend="triton"), want)
    assert torch.equal(dsa.dsa_attention(*inputs, start, stop, 5, backend="triton", return_indices=True)[2], want)


def test_what_wait_returns_does_not_matter(chunks_of_pairs, make_inputs, device):
    """A collective's own wait returns True."""
    chunks_of_pairs(100)
    calls = []
    inputs = [x.float().to(device) for x in make_inputs(40, 40, **SHAPES)]
    stop = torch.arange(1, 41, dtype=torch.int32, device=device)
    wait = lambda: calls.append(1) or True  # noqa: E731
    dsa.dsa_attention(*inputs, torch.zeros_like(stop), stop, 5, backend="triton", wait=wait)
    assert len(calls) == 1


def _leaves(make_inputs, device):
    leaves = [x.float().to(device).requires_grad_() for x in make_inputs(40, 40, **SHAPES)]
    stop = torch.arange(1, 41, dtype=torch.int32, device=device)
    return leaves, (torch.zeros_like(stop), stop)


def test_the_loss_may_be_changed_in_place(make_inputs, device):
    leaves, ranges = _leaves(make_inputs, device)
    _, kl = dsa.dsa_attention(*leaves, *ranges, 5, backend="triton")
    want = torch.autograd.grad(kl.sum() * 2, leaves[3])[0]
    _, kl = dsa.dsa_attention(*leaves, *ranges, 5, backend="triton")
    kl *= 2
    assert torch.equal(torch.autograd.grad(kl.sum(), leaves[3])[0], want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_selection_is_kept_no_longer_than_saved_tensors(checkpointed, make_inputs, device, monkeypatch):
    """Gone after the backward though the outputs live on; under a checkpoint, gone after the forward."""
    seen: list[weakref.ref] = []

    def union(*args):
        made = real(*args)
        seen.append(weakref.ref(made.keys))
        return made

    real = fused.union
    monkeypatch.setattr(fused, "union", union)
    leaves, ranges = _leaves(make_inputs, device)
    run = lambda *inputs: dsa.dsa_attention(*inputs, *ranges, 5, backend="triton")  # noqa: E731
    out, kl = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False) if checkpointed else run(*leaves)
    assert len(seen) == 1
    assert (seen[0]() is None) == checkpointed
    gradients = torch.autograd.grad(out.sum() + kl.sum(), leaves)
    assert all(x() is None for x in seen)
    out, kl = run(*leaves)
    total = out.sum() + kl.sum()
    torch.autograd.grad(total, leaves, retain_graph=True)
    for got, want in zip(torch.autograd.grad(total, leaves), gradients):
        torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


def test_either_gradient_alone(make_inputs, device):
    """Only out, only kl, expanded gradients, and inputs of which some have no gradient."""
    leaves, ranges = _leaves(make_inputs, device)
    run = lambda: dsa.dsa_attention(*leaves, *ranges, 5, backend="triton")  # noqa: E731
    out, kl = run()
    whole = torch.autograd.grad((out, kl), leaves, (torch.ones_like(out), torch.ones_like(kl)))
    for part, result in ((slice(0, 3), 0), (slice(3, 6), 1)):
        got = torch.autograd.grad(run()[result].sum(), leaves, allow_unused=True)
        for at, (one, all_) in enumerate(zip(got, whole)):
            if at in range(*part.indices(6)):
                torch.testing.assert_close(one, all_)
            else:
                assert one is None
    leaves[1].requires_grad_(False)
    leaves[4].requires_grad_(False)
    out, kl = run()
    rest = [0, 2, 3, 5]
    for at, got in zip(rest, torch.autograd.grad(out.sum() + kl.sum(), [leaves[i] for i in rest])):
        torch.testing.assert_close(got, whole[at])
