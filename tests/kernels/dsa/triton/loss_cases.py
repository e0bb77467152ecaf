"""The indexer's loss by its definition: whole matrices, float64, autograd; and what its kernels take in and give back.

Unions are built here from masks, a block at a time, apart from the kernels that build them in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend.blocks import BLOCK, Chunk, Union, block_windows, chunks_of

ATTENTION_SCALE = 0.3


@dataclass
class Case:
    """Inputs as the kernels take them, and which keys a query looks at; T queries, S keys."""

    q: Tensor  # [T,Hq,D]
    k: Tensor  # [S,Hkv,D]
    iq: Tensor  # [T,Hi,Di]
    ik: Tensor  # [S,Di]
    iw: Tensor  # [T,Hi]
    key_start: Tensor  # int32 [T]
    key_stop: Tensor
    sparse: bool
    mask: Tensor  # bool [T,S]
    grad_kl: Tensor  # [T], a third of it 0
    windows: Tensor
    chunks: list[Chunk]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def union(self, chunk: Chunk) -> Union | None:
        return union_of(self.mask, chunk) if self.sparse else None

    def matrix(self, stored: Tensor, chunk: Chunk) -> Tensor:
        """What the kernels keep of a chunk, [N,16] or [C,W] -> [C,S], 0 where nothing is kept; a block's window is read whole."""
        whole = stored.new_zeros(chunk.num_blocks * BLOCK, self.mask.shape[1])
        union = self.union(chunk)
        for block in range(chunk.num_blocks):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            if union is not None:
                entries = slice(int(union.start[block]), int(union.start[block + 1]))
                whole[rows, union.keys[entries].long()] = stored[entries].T
            else:
                low, high = self.windows[:, chunk.rows.start // BLOCK + block].tolist()
                seen = stored[rows, low - chunk.keys.start : high - chunk.keys.start]
                whole[rows, low:high][: len(seen)] = seen
        return whole[: chunk.num_rows]


def make_case(
    layout: Callable, name: str, device, sparse: bool, dtype=torch.float32, heads=(4, 2), dim=32, indexer=(4, 32), size=1.0,
    topk=12, pairs=None, seed=0,
) -> Case:  # fmt: skip
    """A named layout with random inputs of `dtype`; size multiplies the gates; pairs cuts the queries into more chunks."""
    num_queries, num_keys, start, stop = layout(name)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, heads[0], dim), (num_keys, heads[1], dim), (num_queries, *indexer), (num_keys, indexer[1])]
    tensors = [torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in shapes]
    gates = (torch.randn(num_queries, indexer[0], generator=generator) * size).to(dtype).to(device)
    mask = reference.range_mask(start, stop, num_keys)
    if sparse:  # any selection will do; half of it is what the neighbours look at
        taste = torch.rand(num_queries, num_keys, generator=generator) + torch.rand(num_keys, generator=generator)
        order = taste.masked_fill(~mask, -1).argsort(-1, descending=True)
        mask &= torch.zeros_like(mask).scatter_(1, order[:, :topk], True)
    grad_kl = torch.rand(num_queries, generator=generator) * (torch.arange(num_queries) % 3 > 0)
    windows = block_windows(start, stop)
    chunks = chunks_of(windows, num_queries, pairs)
    q, k, iq, ik = tensors
    start, stop, mask, grad_kl, windows = (x.to(device) for x in (start, stop, mask, grad_kl, windows))
    return Case(q, k, iq, ik, gates, start, stop, sparse, mask, grad_kl, windows, chunks)


def wide(_: str) -> tuple[int, int, Tensor, Tensor]:
    """A layout of more keys than a tile or a program takes; the second block's window begins with the last key of a tile."""
    start, stop = torch.zeros(20, dtype=torch.int32), 700 - 3 * torch.arange(20, dtype=torch.int32)
    start[16:] = 127
    return 20, 700, start, stop


def union_of(mask: Tensor, chunk: Chunk) -> Union:
    """bool [T,S] -> the union of each block of the chunk."""
    starts, keys, words = [0], [], []
    for first in range(chunk.rows.start, chunk.rows.stop, BLOCK):
        block = mask[first : first + BLOCK].cpu()
        used = block.any(0).nonzero()[:, 0]
        bits = (block[:, used].int() << torch.arange(len(block))[:, None]).sum(0)
        keys.append(used.int())
        words.append(torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16))
        starts.append(starts[-1] + len(used))
    start, listed, kept = (x.to(mask.device) for x in (torch.tensor(starts).int(), torch.cat(keys), torch.cat(words)))
    return Union(start, listed, kept, int(start.diff().max()))


def define(case: Case) -> SimpleNamespace:
    """Every quantity of the loss and its gradients in float64: lse [T,Hq], p [T,S] summed over heads, scores, student_lse,
    kl, d_scores, and d_iq, d_ik, d_iw of sum(grad_kl * kl)."""
    q, k = case.q.double(), case.k.double()
    iq, ik, iw = (x.double().requires_grad_() for x in (case.iq, case.ik, case.iw))
    _, lse, probabilities = reference._attend(q, k, torch.zeros_like(k), case.mask, ATTENTION_SCALE)
    p = reference.teacher(probabilities)
    scores = reference.index_scores(iq, ik, iw)
    scores.retain_grad()
    kl = reference.indexer_kl(p, scores, case.mask)
    (kl * case.grad_kl).sum().backward()
    seen = case.mask.any(-1)
    student_lse = torch.where(seen, scores.detach().masked_fill(~case.mask, -torch.inf).logsumexp(-1), 0)
    return SimpleNamespace(
        lse=lse.contiguous(), p=p * case.heads, scores=scores.detach(), student_lse=student_lse, kl=kl.detach(), d_scores=scores.grad,
        d_iq=iq.grad, d_ik=ik.grad, d_iw=iw.grad,
    )  # fmt: skip


def logits_of(case: Case, scores: Tensor, chunk: Chunk) -> Tensor:
    """scores [T,S] -> float32 [C,W] as the scoring kernel leaves it: NaN where no query of a row sees the key."""
    visible = reference.range_mask(case.key_start, case.key_stop, scores.shape[1])
    return scores.float().masked_fill(~visible, torch.nan)[chunk.rows, chunk.keys].contiguous()


def stored_of(case: Case, matrix: Tensor, chunk: Chunk) -> Tensor:
    """[T,S] -> float32 [N,16] or [C,W] as the kernels keep it, 0 inside a block's window and NaN outside."""
    union, matrix = case.union(chunk), matrix.float() * case.mask
    if union is None:
        kept = torch.full((chunk.num_rows, chunk.width), torch.nan, device=matrix.device)
    else:
        kept = torch.full((len(union.keys), BLOCK), 0.0, device=matrix.device)
    for block in range(chunk.num_blocks):
        first = chunk.rows.start + block * BLOCK
        rows = matrix[first : first + BLOCK]
        if union is None:
            low, high = case.windows[:, first // BLOCK].tolist()
            part = kept[block * BLOCK : (block + 1) * BLOCK, low - chunk.keys.start : high - chunk.keys.start]
            part.copy_(rows[:, low:high])
        else:
            entries = slice(int(union.start[block]), int(union.start[block + 1]))
            kept[entries, : len(rows)] = rows[:, union.keys[entries].long()].T
    return kept


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; inf if anything is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@contextmanager
def poison() -> Iterator[None]:
    """Fresh memory is NaN: what a kernel does not write, nobody may read."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def filled(make: Callable) -> Callable:
        def allocate(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return allocate

    torch.Tensor.new_empty, torch.empty = filled(new_empty), filled(empty)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty = new_empty, empty  # type: ignore[method-assign]
