"""Who works on what, so that nobody waits: frames over the ranks of a block, packed rows over the blocks.

Costs are floating-point work up to a common constant; every rank computes the same answer from the same costs.
"""

from __future__ import annotations

import heapq

import torch

from megatron_keye.config.model import ModelConfig


def frame_cost(patches: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """Work of encoding frames of n patches, a * n + b * n^2: matrices, and attention inside the frame. float64 [F]"""
    n, h, merge = patches.double(), cfg.vision_hidden_size, cfg.merge_size**2
    layer = 4 * h * h + 2 * h * cfg.vision_ffn_hidden_size
    ends = 3 * cfg.patch_size**2 * h + merge * h * (merge * h + cfg.hidden_size) / merge
    return (cfg.vision_layers * layer + ends) * n + cfg.vision_layers * 2 * h * n * n


def deal(cost: torch.Tensor, ranks: int) -> torch.Tensor:
    """Longest first, each to the rank with least so far -> the rank of each frame, int64 [F]. Ties: lowest index."""
    owner = [0] * len(cost)
    heap = [(0.0, rank) for rank in range(ranks)]
    costs = cost.tolist()
    for frame in torch.argsort(cost, descending=True, stable=True).tolist():
        load, rank = heap[0]
        owner[frame] = rank
        heapq.heapreplace(heap, (load + costs[frame], rank))
    return torch.tensor(owner, dtype=torch.int64)


def deal_evenly(cost: list[float], ranks: int) -> list[list[int]]:
    """Equally many to each -> for every rank the indices it gets, in the order in which it works on them.

    Ranks that share experts take their n-th item at the same time, so the n-th items of all ranks cost about the same:
    neighbours in the order of costs. Within such a round the costliest goes to the rank with least so far.
    """
    order = sorted(range(len(cost)), key=lambda i: (-cost[i], i))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for begin in range(0, len(order), ranks):
        free = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, item in zip(free, order[begin : begin + ranks], strict=True):
            hands[rank].append(item)
            load[rank] += cost[item]
    return hands


def imbalance(loads: list[float]) -> float:
    """Greatest load over mean load: 1.0 is perfect, and what nothing to do counts as."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
