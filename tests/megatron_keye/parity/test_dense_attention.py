"""Dense attention over key ranges against torch's scaled_dot_product_attention, its plain (math) kernel in float64.

The ranges are a mask there. Values, log-sum-exp and gradients of q, k and v; causal and packed rows, the tail of a longer
row, grouped heads. Bounds, as relative norms: 1e-13 in float64 (measured 2e-15), 2e-6 in fp32 (measured 4e-7: sums of up
to 400 terms). A query that sees no key has no counterpart: torch gives NaN, ours zero (tests/kernels/dsa).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keye_kernels import dsa
from keye_kernels.dsa.reference import range_mask
from tests.megatron_keye.parity.compare import assert_near, error, generator

BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6}
HEADS = {"one KV head": (4, 1), "grouped": (8, 2), "not grouped": (3, 3)}
DIM = 64


def packed(*lengths: int) -> tuple[Tensor, Tensor]:
    start = torch.tensor([sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    return start, torch.arange(1, len(start) + 1, dtype=torch.int32)


ROWS = {  # key_start, key_stop, number of keys
    "causal": (*packed(400), 400),
    "packed": (*packed(1, 130, 70, 1, 98), 300),
    "tail": (torch.zeros(60, dtype=torch.int32), torch.arange(241, 301, dtype=torch.int32), 300),
    "window": ((torch.arange(200) - 31).clamp_min(0).int(), torch.arange(1, 201).int(), 200),
}


def inputs(row: str, heads: tuple[int, int]) -> list[Tensor]:
    """q, k, v in float64, with values that fp32 holds"""
    queries, keys, random = len(ROWS[row][0]), ROWS[row][2], generator(0)
    shapes = ((queries, heads[0], DIM), (keys, heads[1], DIM), (keys, heads[1], DIM))
    return [torch.randn(shape, generator=random).double() for shape in shapes]


def run(attend, qkv: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v = leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out, lse = attend(q, k, v)
    upstream = torch.randn(out.shape, generator=generator(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip("qkv", gradients))}


def torchs(row: str, scale: float | None = None):
    visible = range_mask(*ROWS[row])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
        logits = torch.einsum("thd,shd->ths", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        logits = logits * (DIM**-0.5 if scale is None else scale)
        return out[0].transpose(0, 1), logits.masked_fill(~visible[:, None], -torch.inf).logsumexp(-1)

    return attend


def ours(row: str, backend: str, scale: float | None = None):
    return lambda q, k, v: dsa.dense_attention(q, k, v, *ROWS[row][:2], scale=scale, backend=backend)


@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row", ROWS)
def test_values_and_gradients(row: str, heads: str, backend: str, dtype: torch.dtype):
    qkv = inputs(row, HEADS[heads])
    assert_near(run(ours(row, backend), qkv, dtype), run(torchs(row), qkv, torch.float64), BOUNDS[dtype])


def test_another_scale():
    qkv = inputs("packed", (8, 2))
    want = run(torchs("packed", 0.3), qkv, torch.float64)
    assert_near(run(ours("packed", "torch", 0.3), qkv, torch.float64), want, BOUNDS[torch.float64])
    assert error(run(ours("packed", "torch"), qkv, torch.float64)["out"], want["out"]) > 0.1


def test_one_key_too_many_is_noticed():
    """A document that sees the last token of the one before it."""
    qkv = inputs("packed", (8, 2))
    start, stop, _ = ROWS["packed"]
    leaking = start - (start == 131).int()
    got = run(lambda q, k, v: dsa.dense_attention(q, k, v, leaking, stop), qkv, torch.float64)
    want = run(torchs("packed"), qkv, torch.float64)
    assert all(error(got[name], want[name]) > 1e-3 for name in want)
