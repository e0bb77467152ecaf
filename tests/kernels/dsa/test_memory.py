"""Peak of live tensor bytes, counted allocation by allocation, grows with the length and not with its square."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from keye_kernels import dsa
from keye_kernels.dsa import torch_backend, triton_backend
from keye_kernels.dsa.triton_backend import blocks, fused
from keye_kernels.dsa.triton_backend.recorder import Recorder


def peak_bytes(length: int, mode: str, backend: str, deterministic: bool = False) -> int:
    """Greatest number of bytes that PyTorch's CPU allocator held during one forward and backward, above the inputs.

    No kernel of the Triton backend runs: a recorder stands in, and lets 16 neighbours agree on a quarter of their 128 keys.
    """
    module = {"torch": torch_backend, "triton": triton_backend, "reference": dsa.reference}[backend]
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 2, 32), (length, 1, 32), (length, 1, 32), (length, 2, 16), (length, 16), (length, 2)]
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    start, stop = torch.zeros(length, dtype=torch.int32), torch.arange(1, length + 1, dtype=torch.int32)
    standing_in = Recorder(4 * 128) if backend == "triton" else nullcontext()
    with standing_in, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out, kl = module.dsa_attention(*inputs, start, stop, 128, mode, deterministic=deterministic)
        torch.autograd.backward((out, kl), (torch.ones_like(out), torch.ones_like(kl)))
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_linear(mode):
    assert peak_bytes(4096, mode, "torch") < 2.3 * peak_bytes(2048, mode, "torch")


def test_the_measure_sees_a_square():
    """The whole-matrix definition is quadratic, and the count says so."""
    assert peak_bytes(1024, "sparse", "reference") > 3.5 * peak_bytes(512, "sparse", "reference")


@pytest.mark.slow  # 32K keys under the profiler take a minute
def test_linear_at_32k():
    small, large = peak_bytes(16384, "sparse", "torch"), peak_bytes(32768, "sparse", "torch")
    assert large < 2.3 * small
    assert large < 32768**2 * 4 / 8  # an eighth of one fp32 score matrix


@pytest.mark.parametrize(("mode", "deterministic"), [("sparse", False), ("sparse", True), ("warmup", False)])
def test_buffers_of_triton_are_linear(mode, deterministic, monkeypatch):
    """All that the Triton backend allocates, with a recorder in place of its kernels; small chunks, so that what grows shows."""
    for module in (blocks, fused):
        monkeypatch.setattr(module, "PAIRS_PER_CHUNK", 2**22)
    small, large = (peak_bytes(length, mode, "triton", deterministic) for length in (16384, 32768))
    assert large < 2.3 * small
    assert large < 32768**2 * 4 / 8


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_chunks_of_triton_bound_the_rest(mode):
    """At the size of chunk that is used: a few GiB of scores and probabilities, whatever the length."""
    assert peak_bytes(65536, mode, "triton") < 4 * 2**30
    assert peak_bytes(65536, mode, "triton") < 1.3 * peak_bytes(32768, mode, "triton")
