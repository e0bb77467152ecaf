"""The indexer of one chunk: scores, selection, and the way back to iq, ik and iw.

C query rows, N keys, Hi indexer heads, Di indexer dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..quantise import accumulate_dtype


def index_scores(iq: Tensor, ik: Tensor, iw: Tensor) -> tuple[Tensor, Tensor]:
    """iq [C,Hi,Di], ik [N,Di], iw [C,Hi] -> scores [C,N] and each head's agreement relu(iq . ik) [C,Hi,N]."""
    acc = accumulate_dtype(iq)
    num_rows, num_heads, dim = iq.shape
    agreement = torch.mm(iq.reshape(-1, dim).to(acc), ik.to(acc).T).view(num_rows, num_heads, -1).relu_()
    scores = torch.bmm(iw.to(acc)[:, None], agreement)[:, 0]
    return scores.mul_(dim**-0.5), agreement


def score_gradients(
    grad: Tensor, agreement: Tensor, iq: Tensor, ik: Tensor, iw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [C,N] of the scores, agreement as above -> gradients of iq, ik, iw, shaped as these.

    With M_h = grad where head h agrees, 0 elsewhere, both d iq_h = iw_h * M_h ik and d iw_h = iq_h . M_h ik need only M_h ik.
    """
    acc = agreement.dtype
    num_rows, num_heads, dim = iq.shape
    iq, ik, iw = iq.to(acc), ik.to(acc), iw.to(acc)
    gated = torch.ops.aten.threshold_backward((grad * dim**-0.5)[:, None].expand_as(agreement), agreement, 0)
    gated = gated.view(num_rows * num_heads, -1)
    pulled = torch.mm(gated, ik).view(num_rows, num_heads, dim)
    grad_ik = torch.mm(gated.T, (iw[..., None] * iq).view(-1, dim))
    return iw[..., None] * pulled, grad_ik, (iq * pulled).sum(-1)


def select(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """scores [C,N], visible bool [C,N] -> bool [C,N]: the topk greatest visible, equal ones to the lower index."""
    num_keys = scores.shape[1]
    expected = visible.sum(-1).clamp_max_(topk)
    if topk >= num_keys or int(expected.max()) < topk:
        return visible
    if scores.sum().isnan():  # a NaN ranks first, so that it shows in the loss; partition would put it anywhere
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    threshold = _kth_greatest(scores, topk)
    chosen = (scores >= threshold) & visible
    odd = (chosen.sum(-1) != expected).nonzero()[:, 0]  # rows where equal scores straddle the threshold
    if odd.numel():
        chosen[odd] = _select_with_ties(scores[odd], threshold[odd], topk) & visible[odd]
    return chosen


def _select_with_ties(scores: Tensor, threshold: Tensor, topk: int) -> Tensor:
    above, equal = scores > threshold, scores == threshold
    wanted = topk - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= wanted))


def _kth_greatest(scores: Tensor, topk: int) -> Tensor:
    """[C,N] -> [C,1]. On a CPU numpy's partition takes a quarter of the time of torch.topk."""
    num_keys = scores.shape[1]
    if scores.device.type != "cpu":
        return scores.kthvalue(num_keys - topk + 1, dim=-1, keepdim=True).values
    at = num_keys - topk
    return torch.from_numpy(np.partition(scores.numpy(), at, axis=-1)[:, at : at + 1].copy())


def indices_of(chosen: Tensor, topk: int, first_key: int) -> Tensor:
    """bool [C,N] with at most topk true in a row -> int32 [C,topk], ascending, padded with -1."""
    counts = chosen.sum(-1, keepdim=True)
    indices = torch.full((chosen.shape[0], topk), -1, dtype=torch.int32, device=chosen.device)
    filled = torch.arange(topk, device=chosen.device) < counts
    indices[filled] = (chosen.nonzero()[:, 1] + first_key).int()
    return indices
