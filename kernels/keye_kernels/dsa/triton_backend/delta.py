"""The row sums that every softmax gradient subtracts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .views import padded_dim

ROWS = 64


@triton.jit
def row_products(out, grad_out, delta, num_rows, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Grid (rows / ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    at = row[:, None] * D + column[None, :]
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    product = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) * tl.load(grad_out + at, mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(delta + row, tl.sum(product, 1), mask=row < num_rows)


def delta(out: Tensor, grad_out: Tensor) -> Tensor:
    """[T,Hq,D] twice -> sum over D of their product, float32 [T,Hq]."""
    sums = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    num_rows, dim = sums.numel(), out.shape[2]
    launch(row_products, (-(-num_rows // ROWS),), out, grad_out, sums, num_rows, D=dim, DP=padded_dim(dim), ROWS=ROWS)
    return sums
