"""Misuse raises at once, and the message begins with the argument's name."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa


@pytest.fixture
def good(make_inputs):
    names = ("q", "k", "v", "iq", "ik", "iw")
    arguments = dict(zip(names, (x.float() for x in make_inputs(6, 9))))
    return arguments | {"key_start": torch.zeros(6).int(), "key_stop": torch.full((6,), 9).int(), "topk": 3}


BAD = {
    "q is no tensor": ("q", TypeError, lambda a: {"q": [1.0]}),
    "q of integers": ("q", TypeError, lambda a: {"q": a["q"].int()}),
    "q of two axes": ("q", ValueError, lambda a: {"q": a["q"][0]}),
    "heads do not divide": ("q", ValueError, lambda a: {"q": a["q"][:, :3]}),
    "k of another dtype": ("k", TypeError, lambda a: {"k": a["k"].double()}),
    "k of another dim": ("k", ValueError, lambda a: {"k": a["k"][..., :8]}),
    "v of another length": ("v", ValueError, lambda a: {"v": a["v"][:5]}),
    "v on another device": ("v", ValueError, lambda a: {"v": a["v"].to("meta")}),
    "iq of another length": ("iq", ValueError, lambda a: {"iq": a["iq"][:5], "iw": a["iw"][:5]}),
    "ik of another length": ("ik", ValueError, lambda a: {"ik": a["ik"][:5]}),
    "ik of another dim": ("ik", ValueError, lambda a: {"ik": a["ik"][:, :8]}),
    "ik of another dtype": ("ik", TypeError, lambda a: {"ik": a["ik"].bfloat16()}),
    "iw of other heads": ("iw", ValueError, lambda a: {"iw": a["iw"][:, :2]}),
    "key_start int64": ("key_start", TypeError, lambda a: {"key_start": a["key_start"].long()}),
    "key_stop int64": ("key_stop", TypeError, lambda a: {"key_stop": a["key_stop"].long()}),
    "key_stop too short": ("key_stop", ValueError, lambda a: {"key_stop": a["key_stop"][:5]}),
    "key_start below 0": ("key_start", ValueError, lambda a: {"key_start": a["key_start"] - 1}),
    "key_stop above S": ("key_stop", ValueError, lambda a: {"key_stop": a["key_stop"] + 1}),
    "start above stop": ("key_start", ValueError, lambda a: {"key_start": torch.tensor([0, 0, 5, 0, 0, 0]).int(),
                                                            "key_stop": torch.full((6,), 4).int()}),
    "topk 0": ("topk", ValueError, lambda a: {"topk": 0}),
    "topk a float": ("topk", ValueError, lambda a: {"topk": 2.0}),
    "mode unknown": ("mode", ValueError, lambda a: {"mode": "dense"}),
    "backend unknown": ("backend", ValueError, lambda a: {"backend": "cuda"}),
    "fake_fp8 of an odd dim": ("fake_fp8", ValueError, lambda a: {"fake_fp8": True, "iq": a["iq"][..., :24],
                                                                 "ik": a["ik"][:, :24]}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_dsa_attention(case, good):
    name, error, change = BAD[case]
    with pytest.raises(error, match=f"^{name}: "):
        dsa.dsa_attention(**(good | change(good)))


def test_good_arguments_pass(good):
    assert len(dsa.dsa_attention(**good)) == 2


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (torch.zeros(6, 2).long(), TypeError),
        (torch.zeros(5, 2).int(), ValueError),
        (torch.full((6, 2), 9).int(), ValueError),
        (torch.full((6, 2), -2).int(), ValueError),
    ],
    ids=["int64", "rows", "above", "below"],
)
def test_sparse_attention(indices, error, good):
    with pytest.raises(error, match=r"^indices: "):
        dsa.sparse_attention(good["q"], good["k"], good["v"], indices)


def test_the_other_operators_check_too(good):
    ranges = (good["key_start"].long(), good["key_stop"])
    with pytest.raises(TypeError, match=r"^key_start: "):
        dsa.dense_attention(good["q"], good["k"], good["v"], *ranges)
    with pytest.raises(TypeError, match=r"^key_start: "):
        dsa.select_topk(good["iq"], good["ik"], good["iw"], *ranges, 3)
