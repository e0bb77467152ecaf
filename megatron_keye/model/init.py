"""Random weights, drawn per released tensor, so that every parallel layout starts from the same model.

Matrices are normal with `init_std`; norms are one, biases zero; the indexer's gate rows are drawn like the rest.
Not published; our default (a real run starts from released weights).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import nn

from megatron_keye.config.model import ModelConfig
from megatron_keye.model.names import Link, links, local_shard, released_shapes


def initialize_weights(modules: Iterable[nn.Module], cfg: ModelConfig, seed: int) -> None:
    for module in modules:
        for name, parameter, link in links(module, cfg):
            draw(parameter, link, name, cfg, seed)


@torch.no_grad()
def draw(parameter: nn.Parameter, link: Link, name: str, cfg: ModelConfig, seed: int) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name:
        parameter.fill_(1.0)
    else:
        is_expert = ".experts." in name
        pieces = [
            _normal(released, shape, cfg.init_std, seed)
            for released, shape in zip(link.released, released_shapes(link, parameter.shape, is_expert))
        ]
        parameter.copy_(local_shard(link.join(pieces), link, is_expert))


def _normal(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed * 1_000_003) % 2**63)
    return torch.randn(shape, generator=generator, device="cpu") * std
