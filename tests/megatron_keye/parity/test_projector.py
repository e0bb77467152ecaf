"""The projector against transformers' PaddleOCR-VL projector: one detail differs, and is tested apart.

PaddleOCR-VL normalises each patch (LayerNorm of h) and then puts four side by side; Keye puts them side by side and
normalises the four together (LayerNorm of 4h, as its released shape says). All else is the same: the order of the four (row
offset outermost), linear, GELU by erf, linear, eps 1e-5. So
- with both norms taken out, everything is compared, with all gradients;
- our norm is compared with torch's own at width 4h;
- where the four patches have equal mean and variance the two designs agree, norms and all, and elsewhere they do not.
fp32, relative norms by tensor, bound 1e-5 (measured 3e-7): sums in another order.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megatron_keye.model.projector import Projector, merge
from tests.megatron_keye.parity.compare import assert_near, error, generator
from tests.megatron_keye.parity.paddle import config, oracles, our_tower, with_time

TOLERANCE = 1e-5
GRID = torch.tensor([[4, 6], [2, 2], [6, 4], [2, 10]])


@pytest.fixture
def ours() -> Projector:
    return our_tower(config()).projector


@pytest.fixture
def theirs(ours: Projector) -> nn.Module:
    """Our two linear layers; its norm's weights are the first quarter of ours, which are made four times the same."""
    _, projector = oracles(config())
    width = projector.pre_norm.normalized_shape[0]
    with torch.no_grad():
        for parameter in ours.pre_norm.parameters():
            parameter.copy_(parameter[:width].repeat(4))
    weights = {n: p[:width] if "norm" in n else p for n, p in ours.named_parameters()}
    projector.load_state_dict(weights)
    return projector


def features(standardised: bool = False) -> Tensor:
    x = torch.randn(int(GRID.prod(-1).sum()), config().vision_hidden_size, generator=generator(8)) * 3 + 1
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) if standardised else x


def both(ours: Projector, theirs: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """-> ours and theirs: the output, the gradient of the features, and those of all weights"""
    results = []
    for module, grid in ((ours, GRID), (theirs, with_time(GRID))):
        leaf = x.clone().requires_grad_()
        out = module(leaf, grid)
        out.backward(torch.randn(out.shape, generator=generator(6)))
        results.append(
            {"output": out.detach(), "features": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}}
        )
    return results


def test_all_but_the_norm(ours, theirs):
    ours.pre_norm = theirs.pre_norm = nn.Identity()
    got, want = both(ours, theirs, features())
    assert len(want) == 2 + 4
    assert_near(got, want, TOLERANCE)


def test_the_norm_is_torchs_over_all_four_patches(ours):
    """Values and gradients, eps 1e-5; small features, so that another eps would show."""
    plain = nn.LayerNorm(4 * config().vision_hidden_size, eps=1e-5)
    plain.load_state_dict(ours.pre_norm.state_dict())
    x = merge(features() * 2e-3, GRID, 2)
    assert error(ours.pre_norm(x), plain(x)) < TOLERANCE
    gradients = [torch.autograd.grad(norm(x).pow(3).sum(), list(norm.parameters())) for norm in (ours.pre_norm, plain)]
    for got, want in zip(*gradients):
        assert error(got, want) < TOLERANCE
    plain.eps = 1e-6
    assert error(ours.pre_norm(x), plain(x)) > 1e-2


def test_the_designs_agree_on_standardised_patches(ours, theirs):
    """Each patch of mean 0 and variance 1: so have four together. Only the way back to the features differs, where theirs
    takes a mean out of each patch and ours one out of the four."""
    got, want = both(ours, theirs, features(standardised=True))
    assert error(got.pop("features"), want.pop("features")) > 1e-2
    for name in ("pre_norm.weight", "pre_norm.bias"):
        got[name] = got[name].unflatten(0, (4, -1)).sum(0)  # theirs serves all four places
    assert_near(got, want, TOLERANCE)


def test_the_designs_part_elsewhere(ours, theirs):
    got, want = both(ours, theirs, features() * torch.arange(1, 1 + len(features()))[:, None])
    assert error(got["output"], want["output"]) > 1e-2


def test_the_order_of_the_four_patches_is_noticed(ours, theirs):
    ours.pre_norm = theirs.pre_norm = nn.Identity()
    other = copy.deepcopy(ours)
    width = config().vision_hidden_size
    with torch.no_grad():  # column offset outermost
        other.linear_1.weight.copy_(ours.linear_1.weight.unflatten(1, (4, width))[:, [0, 2, 1, 3]].flatten(1))
    got, want = both(other, theirs, features())
    assert error(got["output"], want["output"]) > 1e-2
