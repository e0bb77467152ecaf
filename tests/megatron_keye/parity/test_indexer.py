"""The model's Indexer, all of it, against DeepSeek-V3.2's indexer in transformers: projections, norms, rotary, scores, choice.

What differs, and how each is mapped (the last tests show that each matters):
- q comes from the layer's input, not from a low-rank query: the oracle's query input is the hidden state;
- q is RMS-normalised per head, DeepSeek's is not: torch's RMSNorm is put behind the oracle's q projection;
- the gate is the last Hi rows of q's matrix, not a matrix of its own, and has no factor Hi^-0.5: times Hi^0.5 in the oracle;
- rotary positions turn all of the head by three axes: cosines of transformers' Qwen2.5-VL and Qwen3-VL at the indexer's width.
The same: LayerNorm of k with bias and eps 1e-6, rotate-half, relu, Di^-0.5, one key head. The Hadamard turn before
quantisation is in neither. Released shapes: 16 heads of 64. fp32, relative norms, bound 1e-5 (measured 4e-7).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import megatron_keye.model as m
from keye_kernels import dsa
from keye_kernels.dsa.reference import index_mask, index_scores
from megatron_keye.model.indexer import Indexer
from megatron_keye.model.positions import rotary_angles
from tests.megatron_keye.parity.compare import assert_near, error, generator
from tests.megatron_keye.parity.deepseek import assert_same_choice, oracle, score_and_choose
from tests.megatron_keye.parity.test_rotary import LAYOUTS

T, TOPK = 120, 16
VISIBLE = torch.ones(T, T, dtype=torch.bool).tril()


def config(layout: str) -> m.ModelConfig:
    return m.build_config(
        "keye_mini", num_layers=1, head_dim=128, indexer_heads=16, indexer_head_dim=64, mrope_layout=layout
    )


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ours(layout: str) -> Indexer:
    indexer = m.build_model(config(layout)).language_model.decoder.layers[0].self_attention.indexer
    with torch.no_grad():
        for i, p in enumerate(indexer.parameters()):
            noise = torch.randn(p.shape, generator=generator(i))
            p.add_(noise * 0.3) if p.dim() == 1 else p.copy_(noise)
    return indexer


def positions() -> Tensor:
    """[3, 1, T]"""
    return torch.randint(0, 5000, (3, 1, T), generator=generator(3))


def hidden() -> Tensor:
    return torch.randn(T, config("chunked").hidden_size, generator=generator(4))


def our_scores(indexer: Indexer, layout: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    cfg = config(layout)
    angles = rotary_angles(cfg, positions())[..., cfg.head_dim // 2 :]
    iq, ik, iw = indexer(hidden()[:, None], angles)
    parts = iq[:, 0], ik[:, 0], iw[:, 0]
    return index_scores(*parts), parts


def mapped(ours: Indexer):
    """The oracle with our weights."""
    queries = ours.heads * ours.dim
    theirs = oracle(hidden().shape[1], hidden().shape[1], ours.heads, ours.dim, TOPK)
    norm = nn.RMSNorm(ours.dim, eps=1e-6)
    with torch.no_grad():
        theirs.wq_b.weight.copy_(ours.q_proj.weight[:queries])
        theirs.weights_proj.weight.copy_(ours.q_proj.weight[queries:] * ours.heads**0.5)
        theirs.wk.weight.copy_(ours.k_proj.weight)
        norm.weight.copy_(ours.q_norm.weight)
    theirs.k_norm.load_state_dict(ours.k_norm.state_dict())
    theirs.wq_b = nn.Sequential(theirs.wq_b, nn.Unflatten(-1, (ours.heads, ours.dim)), norm, nn.Flatten(-2))
    return theirs


def their_scores(theirs, layout: str) -> tuple[Tensor, Tensor]:
    make, _, sections = LAYOUTS[layout]
    cos, sin = make(64, sections)[0](hidden(), positions())
    return score_and_choose(theirs, hidden(), hidden(), (cos[0], sin[0]), VISIBLE)


def gradients(ours: Indexer, theirs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By our names: theirs are put together, and the gate's factor is undone once more."""
    got = {n: p.grad for n, p in ours.named_parameters()}
    want = {f"k_norm.{n}": p.grad for n, p in theirs.k_norm.named_parameters()}
    want["k_proj.weight"] = theirs.wk.weight.grad
    want["q_norm.weight"] = theirs.wq_b[2].weight.grad
    gate = theirs.weights_proj.weight.grad * ours.heads**0.5
    want["q_proj.weight"] = torch.cat([theirs.wq_b[0].weight.grad, gate])
    return got, want


def test_scores_choice_and_every_gradient(ours: Indexer, layout: str):
    theirs = mapped(ours)
    got, parts = our_scores(ours, layout)
    want, choice = their_scores(theirs, layout)
    assert error(got[VISIBLE], want[VISIBLE]) < 1e-5
    stop = torch.arange(1, T + 1, dtype=torch.int32)
    for backend in ("reference", "torch"):
        chosen = dsa.select_topk(*parts, torch.zeros_like(stop), stop, TOPK, backend)
        assert_same_choice(index_mask(chosen, T), choice, want)
    upstream = torch.randn(T, T, generator=generator(7))[VISIBLE]
    got[VISIBLE].backward(upstream)
    want[VISIBLE].backward(upstream)
    assert_near(*gradients(ours, theirs), 1e-5)


@torch.no_grad()
def test_each_difference_matters(ours: Indexer, layout: str):
    """Undo one mapping at a time: the scores are others, and all but the gate's factor choose others."""
    got, _ = our_scores(ours, layout)
    _, choice = their_scores(mapped(ours), layout)
    without_norm, with_factor, gate_exchanged = (mapped(ours) for _ in range(3))
    without_norm.wq_b = without_norm.wq_b[0]
    with_factor.weights_proj.weight.mul_(ours.heads**-0.5)
    gate_exchanged.weights_proj.weight.copy_(gate_exchanged.weights_proj.weight.roll(1, 0))
    for wrong in (without_norm, gate_exchanged):
        scores, its_choice = their_scores(wrong, layout)
        assert error(scores[VISIBLE], got[VISIBLE]) > 0.1
        assert not torch.equal(its_choice, choice)
    scores, its_choice = their_scores(with_factor, layout)
    assert error(scores[VISIBLE] * ours.heads**0.5, got[VISIBLE]) < 1e-5  # one factor for all keys:
    assert_same_choice(its_choice, choice, scores)  # the same choice, but another softmax and another KL
    other = next(name for name in LAYOUTS if name != layout)
    scores, _ = their_scores(mapped(ours), other)
    assert error(scores[VISIBLE], got[VISIBLE]) > 0.1
