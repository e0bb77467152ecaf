"""What the Triton backend refuses beyond what every backend does, before any kernel starts, by the argument's name."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa.triton_backend.recorder import standing_in


@pytest.fixture
def good(make_inputs, device):
    names = ("q", "k", "v", "iq", "ik", "iw")
    arguments = dict(zip(names, (x.float().to(device) for x in make_inputs(6, 9))))
    ranges = dict(key_start=torch.zeros(6).int().to(device), key_stop=torch.full((6,), 9).int().to(device))
    return arguments | ranges | {"topk": 3, "backend": "triton"}


BAD = {
    "q float64": ("q", TypeError, lambda a: {n: a[n].double() for n in ("q", "k", "v")}),
    "iq float64": ("iq", TypeError, lambda a: {n: a[n].double() for n in ("iq", "ik")}),
    "q of integers": ("q", TypeError, lambda a: {"q": a["q"].int()}),
    "heads do not divide": ("q", ValueError, lambda a: {"q": a["q"][:, :3]}),
    "k of another dtype": ("k", TypeError, lambda a: {"k": a["k"].half()}),
    "v on another device": ("v", ValueError, lambda a: {"v": a["v"].to("meta")}),
    "key_stop above S": ("key_stop", ValueError, lambda a: {"key_stop": a["key_stop"] + 1}),
    "topk 0": ("topk", ValueError, lambda a: {"topk": 0}),
}


@pytest.mark.parametrize("case", BAD)
def test_dsa_attention(case, good):
    def no_launch(*_, **__):
        raise AssertionError("a kernel was started")

    name, error, change = BAD[case]
    with standing_in(no_launch), pytest.raises(error, match=f"^{name}: "):
        dsa.dsa_attention(**(good | change(good)))


def test_plain_operators(good):
    q, k, v = (good[name].double() for name in ("q", "k", "v"))
    with pytest.raises(TypeError, match=r"^q: "):
        dsa.dense_attention(q, k, v, good["key_start"], good["key_stop"], backend="triton")
    with pytest.raises(TypeError, match=r"^q: "):
        dsa.sparse_attention(q, k, v, torch.zeros(6, 2).int().to(q.device), backend="triton")
    indices = torch.full((6, 2), 9).int().to(q.device)
    with pytest.raises(ValueError, match=r"^indices: "):
        dsa.sparse_attention(good["q"], good["k"], good["v"], indices, backend="triton")
