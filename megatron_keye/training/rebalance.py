"""Packed rows change blocks, so that every data-parallel block has a step of about the same cost.

Each block's source rank has read micro-batches of its own. They are all known by their costs, dealt anew
(parallel/balance.py), and those that change hands travel, pixels and all, between source ranks. Losses and gradients
are sums over the step, so who computes which row changes nothing but rounding.

Shapes: B packed rows of S tokens, P patches (see keye_data.sample.Batch).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from keye_data.sample import Batch
from megatron_keye.parallel.balance import deal_evenly

TOKENS = ("input_ids", "targets", "key_start", "key_stop")  # [B, S]; position_ids are three of such


def rebalance(batches: list[Batch], costs: list[float], group: dist.ProcessGroup, device: torch.device) -> list[Batch]:
    """This rank's share, in working order, of the micro-batches of all ranks of `group`; as many as it gave.

    A collective of `group`: every rank gives equally many, of one shape of rows.
    """
    me, ranks, count = group.rank(), group.size(), len(batches)
    outlines: list[Any] = [None] * ranks
    empty = torch.empty(0)
    own = [(cost, len(b.patches), _without_tensors(b, empty)) for cost, b in zip(costs, batches)]
    dist.all_gather_object(outlines, own, group=group)
    everything = [item for its in outlines for item in its]  # item i was read by rank i // count
    hands = deal_evenly([cost for cost, _, _ in everything], ranks)
    sends = [[i - me * count for i in hand if i // count == me] for hand in hands]
    receives = [[i for i in hands[me] if i // count == rank] for rank in range(ranks)]
    arrived = [i for items in receives for i in items]

    tokens = _exchange(
        [_tokens(batches[i], device) for items in sends for i in items],
        [len(items) for items in sends],
        [len(items) for items in receives],
        group,
    )
    lengths = {i: everything[i][1] for i in arrived}
    pixels = _exchange(
        [batches[i].patches.to(device) for items in sends for i in items],
        [sum(len(batches[i].patches) for i in items) for items in sends],
        [sum(lengths[i] for i in items) for items in receives],
        group,
    )
    parts = dict(zip(arrived, zip(tokens, pixels.split([lengths[i] for i in arrived]))))
    return [_batch(everything[i][2], *parts[i]) for i in hands[me]]


def _without_tensors(batch: Batch, empty: torch.Tensor) -> Batch:
    """Keys, sources, counts and the grid, which the host plans with."""
    return replace(batch, patches=empty, position_ids=empty, **dict.fromkeys(TOKENS, empty))


def _tokens(batch: Batch, device: torch.device) -> torch.Tensor:
    """int64 [1, 7, B, S]"""
    rows = [*(getattr(batch, name).to(device, torch.int64) for name in TOKENS), *batch.position_ids.to(device)]
    return torch.stack(rows)[None]


def _batch(outline: Batch, tokens: torch.Tensor, pixels: torch.Tensor) -> Batch:
    parts = dict(zip(TOKENS, tokens[:4]))
    for name in ("key_start", "key_stop"):
        parts[name] = parts[name].to(torch.int32)
    return replace(outline, **parts, position_ids=tokens[4:], patches=pixels)


def _exchange(parts: list[torch.Tensor], send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """`parts`, one after another, are cut by `send` along the first dimension -> what `receive` counts of the others'."""
    outgoing = torch.cat(parts)
    incoming = outgoing.new_empty(sum(receive), *outgoing.shape[1:])
    dist.all_to_all_single(incoming, outgoing, receive, send, group=group)
    return incoming
