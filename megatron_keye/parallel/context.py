"""Context parallelism: zigzag shards of a row, and the gather that puts keys back in global order.

A row of S tokens is cut into 2 x CP chunks; rank r holds chunks r and 2*CP-1-r, so that causal work is even.
Keys are gathered in global order, and so attention sees nothing but ranges; backward reduce-scatters.
A gather runs beside the computation: who begins one works on, and waits where the keys are read.
Shapes: s = S / CP local tokens, b rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist


def zigzag(x: torch.Tensor, rank: int, size: int, dim: int) -> torch.Tensor:
    """This rank's part of a whole row: [.., S, ..] -> [.., s, ..]."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def place(column: torch.Tensor, seq_length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `zigzag` puts each column of a row of `seq_length` tokens -> (context rank, column of its part)."""
    if size == 1:
        return torch.zeros_like(column), column
    length = seq_length // (2 * size)
    chunk, within = column // length, column % length
    second = chunk >= size
    return torch.where(second, 2 * size - 1 - chunk, chunk), within + second * length


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """[s, b, ...] -> [b * s, ...]: the rows of a micro-batch one after another, as one token axis."""
    return x.transpose(0, 1).flatten(0, 1)


def gather_keys(group: dist.ProcessGroup, *parts: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
    """Begin to gather parts [s, b, ...], alike in shape and dtype, from every context rank, in one message.

    -> a tensor [b * S, ...] for each, row after row and each row in global order, and `wait`. Shapes and dtypes are
    right at once; the content is there after `wait`, to be called once. Collective, forward and backward.
    """
    if group.size() == 1:
        return tuple(rows_first(part) for part in parts), _already_here
    *wholes, wait = _GatherKeys.apply(group, *parts)
    return tuple(wholes), wait


def _already_here() -> None: ...


class _GatherKeys(torch.autograd.Function):
    """*wholes, wait = apply(group, *parts)"""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, *parts: torch.Tensor):
        s, b, *rest = parts[0].shape
        ctx.group, ctx.packed = group, (packed := (len(parts), s, b, *rest))
        mine = torch.stack(parts)
        shards = mine.new_empty(group.size() * len(parts), s, b, *rest)
        travelling = [(dist.all_gather_into_tensor(shards, mine, group=group, async_op=True), shards)]
        wholes = [mine.new_empty(b * group.size() * s, *rest) for _ in parts]

        def wait() -> None:
            work, shards = travelling.pop()  # the last to hold the shards: they are freed here
            work.wait()
            with torch.no_grad():  # by now the tensors stand in the graph, and this is their first content
                for whole, shard in zip(wholes, shards.view(-1, *packed).unbind(1)):
                    for chunk, half in _same_tokens(whole, shard):
                        chunk.copy_(half)

        return *wholes, wait

    @staticmethod
    def backward(ctx, *grads):
        by_rank = grads[0].new_empty(ctx.group.size(), *ctx.packed)
        for grad, shard in zip(grads[:-1], by_rank.unbind(1)):  # the last is that of `wait`, None
            for chunk, half in _same_tokens(grad, shard):
                half.copy_(chunk)
        mine = by_rank.new_empty(ctx.packed)
        # Not put behind other work: between here and the projections' backward there is next to none.
        dist.reduce_scatter_tensor(mine, by_rank.flatten(0, 1), group=ctx.group)
        return None, *mine.unbind()


def _same_tokens(whole: torch.Tensor, shards: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """whole [b * S, ...] in global order, shards [CP, s, b, ...] by rank -> views [s / 2, b, ...] of equal meaning."""
    size, s, b = shards.shape[:3]
    chunks = whole.unflatten(0, (b, 2 * size, s // 2)).movedim(0, 2)
    for rank, shard in enumerate(shards):
        first, second = shard.split(s // 2)
        yield chunks[rank], first
        yield chunks[2 * size - 1 - rank], second
