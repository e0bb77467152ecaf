"""Stand-ins for the attention operators in a trace: the buffers they hold and need, and the work they do, without the kernels.

Kernels choose their chunks from the ranges, and what they keep is written in their own modules; the sizes here follow
`keye_kernels.dsa` backend by backend, and are all that a trace does not take from running code.
Shapes: T queries, S keys, Hq query heads, Hkv KV heads, D head dim, Hi indexer heads, Di indexer dim, K = topk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from keye_kernels.dsa.torch_backend import chunks
from megatron_keye.model import attention
from megatron_keye.planning.ledger import Ledger, Work

UNION = 4  # keys a block of 16 queries looks at together, in multiples of K: the kernels' tuning point
BLOCK = 16  # queries of a block, as in keye_kernels.dsa.triton_backend.blocks
PAIRS_PER_CHUNK, ROWS_PER_CHUNK = 2**28, 2**14  # likewise
SCRATCH = 2**27  # bytes, thresholds.py's candidates
# Of forward and backward: products of [T,D] x [D,S] kind. Backward forms the probabilities anew.
FORWARD, BACKWARD = 2, 5


@contextmanager
def stand_ins(ledger: Ledger, backend: str) -> Iterator[None]:
    """Inside, model.attention and the vision encoder call the stand-ins. backend: "torch" | "triton"."""
    real, sdpa = attention.dsa, F.scaled_dot_product_attention
    planned = Planned(ledger, backend)
    attention.dsa = SimpleNamespace(  # type: ignore[assignment]
        dense_attention=planned.dense_attention, dsa_attention=planned.dsa_attention,
        select_topk=planned.select_topk, sparse_attention=planned.sparse_attention,
    )  # fmt: skip
    F.scaled_dot_product_attention = planned.frames  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.dsa, F.scaled_dot_product_attention = real, sdpa  # type: ignore[assignment]


@dataclass(frozen=True)
class Ranges:
    start: Tensor
    stop: Tensor
    topk: int
    sparse: bool
    learns: bool
    teacher_group: Any


class Planned:
    """The four public operators on ghosts, and the vision encoder's attention."""

    def __init__(self, ledger: Ledger, backend: str):
        self.ledger, self.triton = ledger, backend == "triton"

    def dense_attention(self, q, k, v, start, stop, scale=None, backend=None) -> tuple[Tensor, Tensor]:
        pairs = int((stop - start).sum())
        return Attend.apply(self, pairs, q, k, v)

    def sparse_attention(self, q, k, v, indices, scale=None, backend=None, *, deterministic=False):
        return Attend.apply(self, indices.numel() * self.union_factor, q, k, v)

    def select_topk(self, iq, ik, iw, start, stop, topk, backend=None, *, fake_fp8=False) -> Tensor:
        buffers = self.scores(iq, start, stop)
        self.note("scores", 2 * int((stop - start).sum()) * iq.shape[1] * iq.shape[2], iq, ik, *buffers)
        return torch.zeros(len(iq), topk, dtype=torch.int32, device="meta")

    def dsa_attention(
        self, q, k, v, iq, ik, iw, start, stop, topk, mode="sparse", backend=None, *, scale=None, deterministic=False,
        fake_fp8=False, return_indices=False, return_kl=True, teacher_group=None, wait: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if wait is not None:
            wait()
        ranges = Ranges(start, stop, topk, mode == "sparse", return_kl, teacher_group)
        out, kl = AttendAndLearn.apply(self, ranges, q, k, v, iq, ik, iw)
        return out, kl if return_kl else None

    def frames(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """[n, heads, length, D], all pairs of a frame."""
        n, heads, length, dim = q.shape
        fold = lambda x: x.transpose(1, 2).flatten(0, 1)  # noqa: E731
        out, _ = Attend.apply(self, n * length * length, fold(q), fold(k), fold(v))
        return out.view(n, length, heads, dim).transpose(1, 2)

    # ---- sizes

    @property
    def union_factor(self) -> int:
        return UNION if self.triton else 1

    def chunk(self, start: Tensor, stop: Tensor) -> tuple[int, int]:
        """(rows, keys) of the greatest chunk over these ranges."""
        widest = max(int((stop - start).max()), 1)
        if self.triton:
            return max(BLOCK, min(ROWS_PER_CHUNK, len(start), PAIRS_PER_CHUNK // widest)), widest
        rows = min(max(chunks.PAIRS_PER_CHUNK // widest, chunks.ROWS[0]), chunks.ROWS[1])
        return min(rows, len(start)), widest

    def scores(self, iq: Tensor, start: Tensor, stop: Tensor) -> list[Tensor]:
        """A chunk's scores and what selecting among them needs."""
        rows, keys = self.chunk(start, stop)
        if self.triton:
            words = torch.empty(-(-rows // BLOCK), keys, dtype=torch.bfloat16, device="meta")  # 16 bits a word
            return [floats(rows, keys), words, floats(SCRATCH // 4)]
        return [floats(rows, keys), floats(rows, iq.shape[1], keys)]

    def note(self, kind: str, flops: float, *moved: Tensor) -> None:
        self.ledger.work(Work(kind, float(flops), sum(x.numel() * x.element_size() for x in moved)))


class Attend(torch.autograd.Function):
    """out, lse = apply(planned, pairs, q [T,Hq,D], k, v [S,Hkv,D]); keeps its inputs and results, as flash kernels do."""

    @staticmethod
    def forward(ctx, planned: Planned, pairs: int, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.planned, ctx.product = planned, 2.0 * pairs * q.shape[1] * q.shape[2]
        ctx.mark_non_differentiable(lse)
        planned.note("attention", FORWARD * ctx.product, q, k, v, out)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        q, k, v, out, _ = ctx.saved_tensors
        ctx.planned.note("attention", BACKWARD * ctx.product, q, k, v, out, grad_out, q, k, v)
        return None, None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class AttendAndLearn(torch.autograd.Function):
    """out, kl = apply(planned, ranges, q, k, v, iq, ik, iw)."""

    @staticmethod
    def forward(ctx, planned: Planned, ranges: Ranges, q, k, v, iq, ik, iw):
        visible = ranges.stop - ranges.start
        ctx.planned, ctx.ranges, ctx.pairs = planned, ranges, int(visible.sum())
        chosen = int(visible.clamp(max=ranges.topk).sum()) if ranges.sparse else ctx.pairs
        ctx.issued = min(chosen * (planned.union_factor if ranges.sparse else 1), ctx.pairs)
        out, kl, lse = torch.empty_like(q), floats(len(q)), floats(*q.shape[:2])
        kept = [lse, floats(len(q))] if planned.triton else []
        if ranges.sparse and planned.triton:  # of each block its keys, and a 16-bit word for each
            kept.append(floats(-(-len(q) // BLOCK), min(UNION * ranges.topk, int(visible.max())) * 6 // 4))
        elif ranges.sparse:
            kept.append(floats(len(q), ranges.topk))
        buffers = planned.scores(iq, ranges.start, ranges.stop)
        buffers += _attention_buffers(planned, ranges, q, k, forward=True)
        product = 2.0 * ctx.issued * q.shape[1] * q.shape[2]
        planned.note("scores", 2.0 * ctx.pairs * iq.shape[1] * iq.shape[2], iq, ik, iw)
        planned.note("memory", 0, floats(1).expand(3 * ctx.pairs))  # scores are written once and read about twice
        planned.note("attention", FORWARD * product, q, k, v, out)
        if ranges.learns:
            _teach(ctx, product, q, k)
        del buffers
        ctx.save_for_backward(q, k, v, iq, ik, iw, *kept, *([out] if planned.triton else []))
        ctx.set_materialize_grads(False)
        return out, kl

    @staticmethod
    def backward(ctx, grad_out, grad_kl):
        q, k, v, iq, ik, iw, *_ = ctx.saved_tensors
        planned, ranges = ctx.planned, ctx.ranges
        attends = grad_out is not None and any(ctx.needs_input_grad[2:5])
        teaches = grad_kl is not None and any(ctx.needs_input_grad[5:8])
        buffers = _attention_buffers(planned, ranges, q, k, forward=False)
        buffers += [floats(*k.shape), floats(*v.shape), floats(*ik.shape)]  # sums over queries, in fp32
        product, scored = 2.0 * ctx.issued * q.shape[1] * q.shape[2], 2.0 * ctx.issued * iq.shape[1] * iq.shape[2]
        if teaches and not planned.triton:
            buffers += planned.scores(iq, ranges.start, ranges.stop) * 2
        if attends:
            planned.note("attention", BACKWARD * product, q, k, v, q, k, v)
        if teaches:
            _teach(ctx, product, q, k)
            planned.note("scores", 3 * scored, iq, ik, iw, iq, ik, iw)
        grads = [torch.empty_like(x) if attends else None for x in (q, k, v)]
        grads += [torch.empty_like(x) if teaches else None for x in (iq, ik, iw)]
        del buffers
        return None, None, *grads


def _teach(ctx, product: float, q: Tensor, k: Tensor) -> None:
    """The heads' probabilities formed again and summed over heads: of all tensor-parallel ranks, a number for each pair."""
    ctx.planned.note("attention", product, q, k)
    if ctx.ranges.teacher_group is not None:
        ranks = dist.get_process_group_ranks(ctx.ranges.teacher_group)
        ctx.planned.ledger.collective("allreduce", ranks, [floats(1).expand(ctx.issued)])


def _attention_buffers(planned: Planned, ranges: Ranges, q: Tensor, k: Tensor, forward: bool) -> list[Tensor]:
    """Triton: the teacher's p, 16 queries an entry. torch: each chunk's probabilities and their gradients, K and V in fp32."""
    rows, keys = planned.chunk(ranges.start, ranges.stop)
    if planned.triton:
        return [floats(-(-rows // BLOCK), min(UNION * ranges.topk, keys) if ranges.sparse else keys, BLOCK)]
    copies = [floats(*k.shape), floats(*k.shape)]
    return copies + [floats(q.shape[1], rows, keys) for _ in range(2 if forward else 4)]


def floats(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="meta")
