"""Which keys are chosen: exact against a sort written out in Python, with ties everywhere."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa.torch_backend import chunks

BACKENDS = ["reference", "torch"]


def integer_inputs(num_queries, num_keys, num_heads, dim, span, seed):
    """Small integers: every sum is exact in float32, and equal scores abound."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, num_heads, dim), (num_keys, dim), (num_queries, num_heads)]
    return [torch.randint(-span, span + 1, shape, generator=generator).float() for shape in shapes]


def by_hand(iq, ik, iw, start, stop, topk):
    rows = []
    for t in range(len(iq)):
        score = {s: float((iw[t] * (iq[t] @ ik[s]).clamp(min=0)).sum()) for s in range(int(start[t]), int(stop[t]))}
        best = sorted(sorted(score, key=lambda s: (-score[s], s))[:topk])
        rows.append(best + [-1] * (topk - len(best)))
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "tail", "packed", "more-queries", "ragged", "blind"])
@pytest.mark.parametrize(
    ("num_heads", "dim", "span", "topk"), [(4, 32, 1, 7), (2, 4, 1, 16), (1, 2, 1, 5), (16, 16, 3, 100)]
)
def test_exact_on_integers(backend, name, num_heads, dim, span, topk, layout):
    num_queries, num_keys, start, stop = layout(name)
    inputs = integer_inputs(num_queries, num_keys, num_heads, dim, span, seed=dim)
    got = dsa.select_topk(*inputs, start, stop, topk, backend)
    assert got.dtype == torch.int32
    assert torch.equal(got, by_hand(*inputs, start, stop, topk))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [0.0, -1.0, 1.0])
def test_zero_plateau(backend, gate):
    """All scores are 0.0 or -0.0, which are equal: the first keys win."""
    iq, ik, iw = -torch.ones(3, 2, 4), torch.ones(50, 4), torch.full((3, 2), gate)
    iw[1, 0] = -gate
    start, stop = torch.tensor([0, 10, 47]).int(), torch.tensor([50, 40, 50]).int()
    got = dsa.select_topk(iq, ik, iw, start, stop, 5, backend)
    assert got.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [47, 48, 49, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_zero_does_not_lose(backend):
    """Key 0 scores -0.0 (negative gate, no agreement), key 1 scores +0.0, key 2 less: a sort by bits would take key 1 alone."""
    iq = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    ik = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
    iw = torch.tensor([[-1.0, -1.0]])
    got = dsa.select_topk(iq, ik, iw, torch.tensor([0]).int(), torch.tensor([3]).int(), 1, backend)
    assert got.tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_equal_whatever_the_circumstances(dtype, layout, make_inputs, monkeypatch):
    """Again, with grad, without grad, inside the fused operator, in warm-up, and cut otherwise."""
    num_queries, num_keys, start, stop = layout("causal")
    inputs = [x.to(dtype).requires_grad_() for x in make_inputs(num_queries, num_keys)]
    first = dsa.select_topk(*inputs[3:], start, stop, 12)
    assert not first.requires_grad
    with torch.no_grad():
        assert torch.equal(first, dsa.select_topk(*inputs[3:], start, stop, 12))
    fused = [
        dsa.dsa_attention(*inputs, start, stop, 12, mode, return_indices=True)
        for mode in ("sparse", "warmup", "sparse")
    ]
    with torch.no_grad():
        fused.append(dsa.dsa_attention(*inputs, start, stop, 12, return_indices=True))
    assert all(torch.equal(first, result[2]) for result in fused)
    assert torch.equal(fused[0][0], fused[3][0])
    assert torch.equal(fused[0][1], fused[3][1])
    monkeypatch.setattr(chunks, "PAIRS_PER_CHUNK", 500)
    monkeypatch.setattr(chunks, "ROWS", (1, 7))
    assert torch.equal(first, dsa.select_topk(*inputs[3:], start, stop, 12))


def test_decode_step_chooses_as_the_full_forward(layout, make_inputs):
    num_queries, num_keys, start, stop = layout("causal")
    _, _, _, iq, ik, iw = (x.float() for x in make_inputs(num_queries, num_keys))
    whole = dsa.select_topk(iq, ik, iw, start, stop, 12)
    for t in range(num_queries):
        one = dsa.select_topk(iq[t : t + 1], ik[: t + 1], iw[t : t + 1], start[t : t + 1], stop[t : t + 1], 12)
        assert torch.equal(one[0], whole[t]), t


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_shows_in_the_loss(backend, make_inputs):
    """A broken key is chosen rather than hidden, so that the loss tells."""
    inputs = make_inputs(20, 20)
    inputs[4][3] = torch.nan
    start, stop = torch.zeros(20, dtype=torch.int32), torch.full((20,), 20, dtype=torch.int32)
    _, kl, indices = dsa.dsa_attention(*inputs, start, stop, 4, backend=backend, return_indices=True)
    assert (indices == 3).any(-1).all()
    assert kl.isnan().all()
