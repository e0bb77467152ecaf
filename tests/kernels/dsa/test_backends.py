"""The choice of backend, and of the route inside dense attention."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa import backends
from keye_kernels.dsa.torch_backend.causal import causal_sequences


def test_defaults():
    assert backends.resolve(None, torch.device("cpu")).__name__ == "keye_kernels.dsa.torch_backend"
    assert backends.resolve("reference", torch.device("cpu")) is dsa.reference


def test_a_backend_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(backends.MODULES, "triton", "keye_kernels.dsa.no_such_backend")
    for choice, device in (("triton", "cpu"), (None, "cuda")):
        with pytest.raises(NotImplementedError, match=r"^backend: 'triton' is not built yet"):
            backends.resolve(choice, torch.device(device))


def test_causal_sequences_are_recognised(layout):
    _, _, start, stop = layout("long-packed")
    assert causal_sequences(start, stop) == [(0, 45, 0), (45, 67, 45)]


@pytest.mark.parametrize("name", ["tail", "packed", "ragged", "blind"])
def test_other_ranges_are_not(name, layout):
    _, _, start, stop = layout(name)
    assert causal_sequences(start, stop) is None


def test_one_row_that_differs_is_enough(layout):
    _, _, start, stop = layout("long-packed")
    stop[111] -= 1
    assert causal_sequences(start, stop) is None
