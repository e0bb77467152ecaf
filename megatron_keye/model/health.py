"""How well an indexer finds what dense attention looks at: of one layer, on a few blocks of adjacent queries.

Only queries that see more than topk keys count: for the others there is nothing to choose. Per query, with p the dense
attention (mean over heads; p_g over those of a KV group), I the index scores and Omega the keys chosen by them:
    mass      sum of p over Omega                    set       share of the topk keys with the greatest p inside Omega
    kl        KL(p || softmax I) over all seen keys  entropy   of softmax I, in nats
    ties      whether the last key chosen and the first one left have equal scores
    chance    what a choice at random would find: topk over the keys seen
    union-n   keys chosen by any of n adjacent queries, over topk: 1 when all choose alike, n when none do
Memory O(BLOCK * S * heads of a group), never O(T * S).
Shapes: T queries, S keys, H query heads, G KV heads of this tensor-parallel rank, Hi indexer heads, R tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from keye_kernels import dsa
from keye_kernels.dsa.quantise import accumulate_dtype, fake_fp8

BLOCK = 16  # adjacent queries
MOST_BLOCKS = 16  # of one call
PER_QUERY = ("mass", "set", "kl", "entropy", "ties", "chance", "union-8", "union-16")
PER_GROUP = ("mass", "set")


def probe_blocks(start: Tensor, stop: Tensor, topk: int) -> list[int]:
    """First queries of at most MOST_BLOCKS blocks, spread evenly over those of one document whose queries see more than topk keys.

    start, stop: int32 [T].
    """
    count = len(start) // BLOCK
    first, last = (x[: count * BLOCK].view(count, BLOCK) for x in (start, stop))
    adjacent = (first == first[:, :1]).all(1) & (last - last[:, :1] == torch.arange(BLOCK, device=last.device)).all(1)
    found = torch.nonzero(adjacent & (last[:, 0] - first[:, 0] > topk))[:, 0] * BLOCK
    if len(found) > MOST_BLOCKS:
        found = found[torch.linspace(0, len(found) - 1, MOST_BLOCKS).round().long().to(found.device)]
    return found.tolist()


@torch.no_grad()
def measure(
    q: Tensor,  # [T, H, D]
    k: Tensor,  # [S, G, D]
    iq: Tensor,  # [T, Hi, Di]
    ik: Tensor,  # [S, Di]
    iw: Tensor,  # [T, Hi]
    start: Tensor,  # int32 [T]
    stop: Tensor,
    topk: int,
    *,
    quantised: bool = False,
    backend: str | None = None,
    tensor_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """float64 [1 + 8 + 2 * R * G]: queries measured; sums over them of PER_QUERY; of PER_GROUP, group after group.

    Collective over `tensor_group`, whose ranks hold other heads of the same queries.
    """
    groups, ranks = k.shape[1], tensor_group.size() if tensor_group is not None else 1
    sums = q.new_zeros(len(PER_QUERY), dtype=torch.float64)
    by_group = q.new_zeros(len(PER_GROUP), groups, dtype=torch.float64)
    blocks = probe_blocks(start, stop, topk)
    for begin in blocks:
        rows, low = slice(begin, begin + BLOCK), int(start[begin])
        keys = slice(low, int(stop[begin + BLOCK - 1]))
        seen = stop[rows] - low
        indices = dsa.select_topk(
            iq[rows], ik[keys], iw[rows], torch.zeros_like(seen), seen, topk, backend, fake_fp8=quantised
        )
        visible = torch.arange(keys.stop - low, device=q.device) < seen[:, None]
        chosen = torch.zeros_like(visible).scatter_(1, indices.long(), True)
        p = _dense(q[rows], k[keys], visible)
        by_group += torch.stack([_mass(p, chosen), _set(p, chosen, topk)]).sum(-1)
        whole = p.sum(0)
        if tensor_group is not None and ranks > 1:
            dist.all_reduce(whole, group=tensor_group)
        whole /= ranks * groups
        pair = (fake_fp8(iq[rows]), fake_fp8(ik[keys])) if quantised else (iq[rows], ik[keys])
        scores = _scores(*pair, iw[rows]).masked_fill(~visible, -torch.inf)
        sums += torch.stack(_of_queries(whole, scores, visible, chosen, topk))
    if tensor_group is not None and ranks > 1:
        parts = by_group.new_empty(ranks * len(PER_GROUP), groups)
        dist.all_gather_into_tensor(parts, by_group, group=tensor_group)
        by_group = parts.unflatten(0, (ranks, len(PER_GROUP))).movedim(0, 1).flatten(1)
    queries = sums.new_tensor([len(blocks) * BLOCK])
    return torch.cat([queries, sums, by_group.flatten()])


def _dense(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """[n, H, D], [S, G, D], bool [n, S] -> [G, n, S]: softmax over the visible keys, mean over the heads of each group."""
    dtype, (n, heads, dim), groups = accumulate_dtype(q), q.shape, k.shape[1]
    by_group = q.to(dtype).view(n, groups, heads // groups, dim)
    found = []
    for group in range(groups):
        logits = torch.einsum("nhd,sd->hns", by_group[:, group], k[:, group].to(dtype)) * dim**-0.5
        found.append(logits.masked_fill_(~visible, -torch.inf).softmax(-1).mean(0))
    return torch.stack(found)


def _scores(iq: Tensor, ik: Tensor, iw: Tensor) -> Tensor:
    """-> [n, S], one head at a time."""
    dtype = accumulate_dtype(iq)
    keys, weights = ik.to(dtype), iw.to(dtype)
    total = keys.new_zeros(len(iq), len(ik))
    for head, query in enumerate(iq.to(dtype).unbind(1)):
        total += weights[:, head, None] * (query @ keys.T).relu()
    return total * iq.shape[-1] ** -0.5


def _mass(p: Tensor, chosen: Tensor) -> Tensor:
    return (p * chosen).sum(-1)


def _set(p: Tensor, chosen: Tensor, topk: int) -> Tensor:
    greatest = p.topk(topk, dim=-1).indices
    return chosen.expand_as(p).gather(-1, greatest).to(p.dtype).mean(-1)


def _of_queries(p: Tensor, scores: Tensor, visible: Tensor, chosen: Tensor, topk: int) -> list[Tensor]:
    """p, scores [n, S] (-inf where not visible) -> PER_QUERY, each summed over the n queries."""
    log_q = scores.log_softmax(-1)
    finite = log_q.masked_fill(~visible, 0)
    edge = scores.topk(topk + 1, dim=-1).values[:, -2:]
    each = [
        _mass(p, chosen),
        _set(p, chosen, topk),
        (torch.special.xlogy(p, p) - p * finite).sum(-1),
        -(log_q.exp() * finite).sum(-1),
        edge[:, 0] == edge[:, 1],
        topk / visible.sum(-1).double(),
    ]
    return [x.double().sum() for x in each] + [_union(chosen, n) / topk for n in (8, 16)]


def _union(chosen: Tensor, size: int) -> Tensor:
    """Distinct keys of each `size` adjacent queries; each query counts with those of its own block."""
    return size * chosen.view(-1, size, chosen.shape[1]).any(1).sum().double()
