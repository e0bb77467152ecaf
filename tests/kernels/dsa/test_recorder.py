"""The recorder: what it says would run is what Triton would compile, and nothing runs."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from keye_kernels.dsa import triton_backend
from keye_kernels.dsa.triton_backend.launch import launch
from keye_kernels.dsa.triton_backend.recorder import Recorder, standing_in


def record(union_entries: int, mode: str = "sparse", length: int = 512) -> Recorder:
    shapes = [(length, 4, 64), (length, 2, 64), (length, 2, 64), (length, 2, 32), (length, 32), (length, 2)]
    leaves = [torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    start, stop = torch.zeros(length, dtype=torch.int32), torch.arange(1, length + 1, dtype=torch.int32)
    with Recorder(union_entries) as recorder:
        out, kl = triton_backend.dsa_attention(*leaves, start, stop, 16, mode)
        torch.autograd.backward((out, kl), (torch.zeros_like(out), torch.zeros_like(kl)))
    return recorder


def test_overlap_decides_the_path():
    gathered, whole = ({x.name for x in record(entries).launches} for entries in (32, 512))
    assert "union_gradients" in gathered - whole
    assert "key_gradients" in whole - gathered


def test_signature():
    first = record(32).launches[0]
    signature, constants = dict(first.signature), dict(first.constants)
    assert first.name == "_scores"
    assert first.grid == (512 // constants["ROWS"], 1)
    assert (signature["iq"], signature["logits"], signature["num_rows"]) == ("*bf16", "*fp32", "i32")
    assert signature["HEADS"] == "constexpr"
    assert constants["HEADS"] == 2
    assert {"iq", "num_rows"} <= set(first.divisible)


def test_modules_get_their_launch_back():
    modules = [sys.modules[f"{triton_backend.__name__}.{name}"] for name in ("scores", "teacher", "union")]
    with pytest.raises(ZeroDivisionError), standing_in(lambda *_, **__: None):
        assert all(module.launch is not launch for module in modules)
        raise ZeroDivisionError
    assert all(module.launch is launch for module in modules)


def test_dispatch_is_told_on_request(caplog):
    with caplog.at_level(logging.DEBUG, logger="keye_kernels.dsa"):
        record(32)
        record(512)
    told = [x.message for x in caplog.records]
    assert any(message.startswith("queries 0..512: ") and message.endswith("union") for message in told)
    assert any(message.endswith("words") for message in told)
