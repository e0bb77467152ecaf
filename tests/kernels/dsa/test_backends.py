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


def test_triton_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    for choice, device in (("triton", "cpu"), (None, "cuda")):
        with pytest.raises(RuntimeError, match=r"^backend: 'triton' needs the package triton"):
            backends.resolve(choice, torch.device(device))


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' needs CUDA tensors, these are on cpu"):
        backends.resolve("triton", torch.device("cpu"))


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
