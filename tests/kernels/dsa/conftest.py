"""Inputs, key ranges and a runner that returns every result and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from keye_kernels import dsa

NAMES = ("out", "kl", "q", "k", "v", "iq", "ik", "iw")


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    return starts, torch.arange(1, len(starts) + 1, dtype=torch.int32)


def layout(name: str) -> tuple[int, int, Tensor, Tensor]:
    """T, S, key_start, key_stop of a named arrangement."""
    if name == "causal":
        starts, stops = packed([83])
        return 83, 83, starts, stops
    if name == "tail":  # the last queries of a longer sequence, as in a context-parallel shard or a decode step
        return 29, 101, torch.zeros(29, dtype=torch.int32), torch.arange(73, 102, dtype=torch.int32)
    if name == "packed":  # with one-token documents
        starts, stops = packed([1, 17, 1, 1, 40, 23])
        return 83, 83, starts, stops
    if name == "long-packed":  # whole causal sequences, long enough for the CPU kernel of PyTorch
        starts, stops = packed([45, 67])
        return 112, 112, starts, stops
    if name == "more-queries":  # T > S
        return 97, 41, torch.zeros(97, dtype=torch.int32), (torch.arange(97) % 41 + 1).int()
    if name == "ragged":  # arbitrary ranges, some empty, at the ends too
        generator = torch.Generator().manual_seed(5)
        ends = torch.randint(0, 72, (61, 2), generator=generator).sort(-1).values.int()
        starts, stops = ends[:, 0].clone(), ends[:, 1].clone()
        for row, at in ((0, 0), (7, 71), (8, 3), (60, 20)):
            starts[row] = stops[row] = at
        return 61, 71, starts, stops
    if name == "blind":  # nobody sees anything
        return 5, 9, torch.full((5,), 4, dtype=torch.int32), torch.full((5,), 4, dtype=torch.int32)
    raise KeyError(name)


@pytest.fixture(name="layout")
def layout_fixture() -> Callable:
    return layout


@pytest.fixture
def make_inputs() -> Callable:
    """q, k, v, iq, ik, iw in float64 whose values a float32 holds exactly."""

    def make(num_queries, num_keys, heads=(4, 2), dim=32, indexer=(4, 32), seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(num_queries, heads[0], dim), (num_keys, heads[1], dim), (num_keys, heads[1], dim)]
        shapes += [(num_queries, *indexer), (num_keys, indexer[1]), (num_queries, indexer[0])]
        return [torch.randn(*shape, generator=generator).double() for shape in shapes]

    return make


@pytest.fixture
def run_all() -> Callable:
    """Forward and backward of dsa_attention with fixed random upstream gradients -> the indices and {name: tensor}.

    Runs on `device`, given what is on the CPU, and returns to it.
    """

    def run(backend, inputs, key_start, key_stop, topk, mode="sparse", dtype=torch.float64, device="cpu", **options):
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
        out, kl, indices = dsa.dsa_attention(
            *leaves, key_start.to(device), key_stop.to(device), topk, mode, backend, return_indices=True, **options
        )
        generator = torch.Generator().manual_seed(99)
        grad_out = torch.randn(out.shape, generator=generator).to(out)
        grad_kl = torch.rand(kl.shape, generator=generator).to(kl)
        torch.autograd.backward((out, kl), (grad_out, grad_kl))
        tensors = (out.detach(), kl.detach(), *(leaf.grad for leaf in leaves))
        return indices.cpu(), {name: x.cpu() for name, x in zip(NAMES, tensors)}

    return run


@pytest.fixture
def assert_near() -> Callable:
    """Every tensor within tolerance of its partner, by norm: a ReLU that flips at 0 moves single elements."""

    def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
        for name, expected in want.items():
            assert got[name].shape == expected.shape, name
            assert torch.isfinite(got[name]).all(), name
            error = (got[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: relative error {error:.1e} above {tolerance:.0e}"

    return check
