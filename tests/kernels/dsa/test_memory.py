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

SMALL = (2, 1, 32, 2, 16, 128)  # Hq, Hkv, D, Hi, Di, K
KEYE = (32, 4, 128, 16, 64, 2048)


def peak_bytes(
    length: int, mode: str, backend: str, deterministic: bool = False, layer=SMALL, dtype=torch.float32
) -> int:
    """Greatest number of bytes that PyTorch's CPU allocator held during one forward and backward, above the inputs.

    No kernel of the Triton backend runs: a recorder stands in, and lets 16 neighbours look at 4 K keys together.
    """
    module = {"torch": torch_backend, "triton": triton_backend, "reference": dsa.reference}[backend]
    heads, kv_heads, dim, indexer_heads, indexer_dim, topk = layer
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, heads, dim), (length, kv_heads, dim), (length, kv_heads, dim)]
    shapes += [(length, indexer_heads, indexer_dim), (length, indexer_dim), (length, indexer_heads)]
    inputs = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    start, stop = torch.zeros(length, dtype=torch.int32), torch.arange(1, length + 1, dtype=torch.int32)
    standing_in = Recorder(4 * topk) if backend == "triton" else nullcontext()
    with standing_in, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out, kl = module.dsa_attention(*inputs, start, stop, topk, mode, deterministic=deterministic)
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


@pytest.mark.slow  # inputs and gradients of a whole layer, 2 GiB
def test_a_layer_of_keye_at_64k():
    """8 GiB are allowed above inputs and outputs at 256K; a quarter of it here, with 1 GiB of scores that does not grow."""
    length, rows = 65536, 32 * 128 + 2 * 4 * 128 + 16 * 64 + 64 + 16  # elements a token of q, k, v, iq, ik, iw
    outputs = length * (2 * rows + 2 * 32 * 128 + 4)  # the gradients, out, kl
    assert peak_bytes(length, "sparse", "triton", layer=KEYE, dtype=torch.bfloat16) - outputs < 2 * 2**30
