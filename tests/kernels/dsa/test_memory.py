"""Peak of live tensor bytes, counted allocation by allocation, grows with the length and not with its square."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from keye_kernels import dsa


def peak_bytes(length: int, mode: str, backend: str) -> int:
    """Greatest number of bytes that PyTorch's CPU allocator held during one forward and backward, above the inputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 2, 32), (length, 1, 32), (length, 1, 32), (length, 2, 16), (length, 16), (length, 2)]
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    start, stop = torch.zeros(length, dtype=torch.int32), torch.arange(1, length + 1, dtype=torch.int32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out, kl = dsa.dsa_attention(*inputs, start, stop, 128, mode, backend)
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


@pytest.mark.slow  # 16K keys under the profiler take about ten seconds
def test_linear_at_16k():
    small, large = peak_bytes(8192, "sparse", "torch"), peak_bytes(16384, "sparse", "torch")
    assert large < 2.3 * small
    assert large < 16384**2 * 4 / 8  # an eighth of one fp32 score matrix
