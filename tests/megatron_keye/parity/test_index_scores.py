"""The operators' scoring and selection against DeepSeek-V3.2's indexer in transformers.

The same: score = Di^-0.5 * sum over heads of gate * relu(q . k), the greatest K of the visible keys, one set a token. Not the
same, and undone in the oracle's weights (deepseek.py): its gate's factor Hi^-0.5, its norm of k inside. Not the same and left:
it lists masked keys in short rows where ours has -1, in order of score where ours is ascending, and ties as topk finds them.
fp32; relative norms, bound 1e-5 (measured: scores equal, for Di^-0.5 = 1/8 is exact; gradients of the KL 3e-7).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye_kernels import dsa
from keye_kernels.dsa.reference import index_mask, index_scores, range_mask
from tests.megatron_keye.parity.compare import assert_near, error, generator
from tests.megatron_keye.parity.deepseek import assert_same_choice, identity, score_and_choose

T, HEADS, DIM, TOPK = 150, 16, 64, 24
DOCUMENTS = {"causal": [T], "packed": [40, 1, 70, 9, 30]}
BACKENDS = ["reference", "torch"]


def ranges(name: str) -> tuple[Tensor, Tensor]:
    lengths = DOCUMENTS[name]
    start = torch.tensor([sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    return start, torch.arange(1, T + 1, dtype=torch.int32)


def inputs(learn: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """iq, ik, iw; the gates have both signs."""
    random = generator(2)
    iq, ik, iw = (torch.randn(shape, generator=random) for shape in ((T, HEADS, DIM), (T, DIM), (T, HEADS)))
    return iq.requires_grad_(learn), ik.requires_grad_(learn), iw.requires_grad_(learn)


def theirs(iq: Tensor, ik: Tensor, iw: Tensor, visible: Tensor, topk: int = TOPK) -> tuple[Tensor, Tensor]:
    flat = torch.ones(T, DIM), torch.zeros(T, DIM)  # no rotation
    return score_and_choose(identity(HEADS, DIM, topk), torch.cat([ik, iw], -1), iq.flatten(1), flat, visible)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scores(name: str):
    start, stop = ranges(name)
    visible = range_mask(start, stop, T)
    want, _ = theirs(*inputs(), visible)
    got = index_scores(*inputs())
    assert torch.equal(want.isfinite(), visible)
    assert error(got[visible], want[visible]) < 1e-5
    assert bool((want[visible] < 0).any())
    assert error(got[visible] * HEADS**-0.5, want[visible]) > 0.1  # their factor, had it been left in


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("topk", [1, TOPK, T - 1])
def test_selection(name: str, backend: str, topk: int):
    start, stop = ranges(name)
    scores, want = theirs(*inputs(), range_mask(start, stop, T), topk)
    got = dsa.select_topk(*inputs(), start, stop, topk, backend)
    assert_same_choice(index_mask(got, T), want, scores)


def test_a_wrong_selection_is_noticed():
    """One wrong gate sign; the latest K instead of the greatest."""
    start, stop = ranges("causal")
    scores, want = theirs(*inputs(), range_mask(start, stop, T))
    iq, ik, iw = inputs()
    iw[:, 3] *= -1
    latest = range_mask((stop - TOPK).clamp_min(0), stop, T)
    for wrong in (index_mask(dsa.select_topk(iq, ik, iw, start, stop, TOPK), T), latest):
        with pytest.raises(AssertionError):
            assert_same_choice(wrong, want, scores)


def teacher(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q [T, 4, D], k [T, 2, D] -> mean over heads of softmax over mask, [T, T]"""
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_indexers_loss_and_its_gradients(name: str, mode: str, backend: str):
    """The KL written out on the oracle's scores and, in sparse mode, on its choice; gradients through its code."""
    start, stop = ranges(name)
    random = generator(5)
    q, k, v = (torch.randn(T, heads, 32, generator=random) for heads in (4, 2, 2))
    weight = torch.rand(T, generator=random)

    leaves = inputs(learn=True)
    visible = range_mask(start, stop, T)
    scores, chosen = theirs(*leaves, visible)
    mask = chosen if mode == "sparse" else visible
    p = teacher(q, k, mask)
    log_share = scores.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0)
    kl = (torch.special.xlogy(p, p) - p * log_share).sum(-1)
    want = dict(zip(("iq", "ik", "iw"), torch.autograd.grad((kl * weight).sum(), leaves))) | {"kl": kl.detach()}

    leaves = inputs(learn=True)
    _, kl = dsa.dsa_attention(q, k, v, *leaves, start, stop, TOPK, mode, backend)
    got = dict(zip(("iq", "ik", "iw"), torch.autograd.grad((kl * weight).sum(), leaves))) | {"kl": kl.detach()}
    assert_near(got, want, 1e-5)
