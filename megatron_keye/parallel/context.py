"""Context parallelism: zigzag shards of a row, and the gather that puts keys back in global order.

A row of S tokens is cut into 2 x CP chunks; rank r holds chunks r and 2*CP-1-r, so that causal work is even.
Keys are gathered in global order, and so attention sees nothing but ranges; backward reduce-scatters.
Shapes: s = S / CP local tokens, b rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def zigzag(x: torch.Tensor, rank: int, size: int, dim: int) -> torch.Tensor:
    """This rank's part of a whole row: [.., S, ..] -> [.., s, ..]."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def owner(column: torch.Tensor, seq_length: int, size: int) -> torch.Tensor:
    """Which context rank holds each column of a row of `seq_length` tokens."""
    chunk = column // (seq_length // (2 * size))
    return torch.minimum(chunk, 2 * size - 1 - chunk)


def gather_keys(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, ...] of every context rank -> [S, ...] in global order."""
    return _GatherKeys.apply(x, group) if group.size() > 1 else x


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        size = group.size()
        shards = x.new_empty(size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(shards, x.contiguous(), group=group)
        halves = list(shards.chunk(2 * size))  # rank r's halves stand at 2r and 2r + 1
        return torch.cat(halves[0::2] + halves[1::2][::-1])

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        size = ctx.group.size()
        chunks = grads[0].chunk(2 * size)
        by_rank = torch.cat([c for r in range(size) for c in (chunks[r], chunks[2 * size - 1 - r])])
        mine = by_rank.new_empty(len(by_rank) // size, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(mine, by_rank, group=ctx.group)
        return mine, None
