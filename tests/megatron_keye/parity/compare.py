"""Comparing named tensors of two implementations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_keye.config.model import ModelConfig
from megatron_keye.model.names import links


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`: 0 is equal, 1 is unrelated. Both zero: 0."""
    assert got.shape == want.shape, f"shape {list(got.shape)} against {list(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    difference, scale = (got - want).norm(), want.norm()
    return float(difference / scale) if scale else float(difference)


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and under each of them `error` at most `tolerance`."""
    assert sorted(got) == sorted(want)
    far = {name: error(got[name], want[name]) for name in want}
    far = {name: e for name, e in far.items() if not e <= tolerance}
    assert not far, f"{len(far)} of {len(want)} differ by more than {tolerance:.0e}: {dict(list(far.items())[:5])}"


def released_gradients(modules: Iterable[nn.Module], cfg: ModelConfig) -> dict[str, Tensor]:
    """Gradients of unsharded modules by released name; parameters without one are left out."""
    return {
        released: piece
        for module in modules
        for _, parameter, link in links(module, cfg)
        if parameter.grad is not None
        for released, piece in zip(link.released, link.split(parameter.grad))
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
