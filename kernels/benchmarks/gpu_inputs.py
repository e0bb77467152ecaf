"""Inputs whose indexer really selects what the benchmark wants: blocks of 16 queries whose unions are u times K keys.

Every key lies at a random angle on a circle, every query looks in a direction, and the indexer's score falls with the
angle between them (a Poisson kernel, written as a product of harmonics, 31 of them in 64 dimensions). So a query selects
the arc of keys around its direction, a fraction f = K / visible of the circle; the 16 directions of a block fan out over
(u - 1) f, and their arcs together cover u f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
DECAY = 0.85  # of the harmonics: slow enough to tell 1/128 of a circle in bf16, fast enough to fall without ripples


@dataclass(frozen=True)
class Geometry:
    """The shape of one layer."""

    heads: int
    kv_heads: int
    dim: int
    indexer_heads: int
    indexer_dim: int
    topk: int


KEYE = Geometry(heads=32, kv_heads=4, dim=128, indexer_heads=16, indexer_dim=64, topk=2048)
TINY = Geometry(heads=4, kv_heads=2, dim=16, indexer_heads=2, indexer_dim=16, topk=8)  # for the interpreter


def causal(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """key_start, key_stop int32 [T] of one causal sequence."""
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device)
    return torch.zeros_like(stop), stop


def make_inputs(
    geometry: Geometry, length: int, overlap: float, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k, v, iq, ik, iw; 16 neighbours' selections unite to about `overlap` times K keys, where so many are visible."""
    generator = torch.Generator(device).manual_seed(0)
    g = geometry
    shapes = ((length, g.heads, g.dim), (length, g.kv_heads, g.dim), (length, g.kv_heads, g.dim))
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    turn = 2 * math.pi
    at = torch.arange(length, device=device)
    blocks = torch.rand(-(-length // BLOCK), generator=generator, device=device)
    fraction = (g.topk / (at + 1)).clamp_max(1)
    fan = (overlap - 1) * (at % BLOCK) / (BLOCK - 1)
    look = turn * (blocks[at // BLOCK] + fraction * fan)
    keys = turn * torch.rand(length, generator=generator, device=device)
    gains = 0.5 + torch.rand(g.indexer_heads, generator=generator, device=device)
    iq = harmonics(look, g.indexer_dim, DECAY)[:, None] * gains[:, None]
    iw = 0.5 + torch.rand(length, g.indexer_heads, generator=generator, device=device)
    return [q, k, v, iq.to(dtype), harmonics(keys, g.indexer_dim, 1.0).to(dtype), (iw / g.indexer_heads).to(dtype)]


def harmonics(angles: Tensor, dim: int, decay: float) -> Tensor:
    """[N] -> [N, dim]: 1/2 (at decay 1: 1), then decay^m (cos m a, sin m a). Products with decay 1 are Poisson's kernel."""
    order = torch.arange(1, (dim - 1) // 2 + 1, device=angles.device)
    waves = (
        torch.stack(((angles[:, None] * order).cos(), (angles[:, None] * order).sin()), -1) * (decay**order)[:, None]
    )
    constant = torch.full_like(angles[:, None], 1.0 if decay == 1.0 else 0.5)
    together = torch.cat((constant, waves.flatten(1)), 1)
    return torch.nn.functional.pad(together, (0, dim - together.shape[1]))


def union_entries(indices: Tensor) -> Tensor:
    """int32 [T,K], -1 padded -> int64 [T / 16 rounded up]: different keys that each block of 16 queries looks at."""
    padded = torch.nn.functional.pad(indices, (0, 0, 0, -len(indices) % BLOCK), value=-1)
    counts = []
    for part in padded.view(-1, BLOCK * indices.shape[1]).split(512):
        keys = part.sort(-1).values
        first = torch.ones_like(keys, dtype=torch.bool)
        first[:, 1:] = keys[:, 1:] != keys[:, :-1]
        counts.append((first & (keys >= 0)).sum(-1))
    return torch.cat(counts)
