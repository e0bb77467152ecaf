"""The core attention of one context rank on rows that every rank draws alike, for tests of context parallelism.

launch(fn, 2, ...) with plan.initialize(ParallelConfig(context=2)) and run(...) inside fn
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core import parallel_state as ps
from torch.utils.checkpoint import checkpoint

from keye_kernels import dsa
from megatron_keye.config.model import build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.model.attention import SparseCoreAttention
from megatron_keye.model.transformer_config import language_config
from megatron_keye.parallel.context import zigzag

S, TOPK = 64, 7
# Lengths of the documents of each row, negative for columns that see nothing. CP = 4 cuts every 8 columns.
ROWS = {
    "one document": ([64], [64]),
    "packed": ([1, 13, 1, 1, 21, 5, 17, -5], [30, 1, 33]),
    "blind shards": ([8, -48, 8], [5, -56, 1, 1, 1]),  # only the rank of the first and last chunk sees anything
}
NAMES = ("query", "key", "value", "iq", "ik", "iw")


def ranges_of(lengths: list[int]) -> torch.Tensor:
    """int32 [2, S]: documents one after another; a negative length is that many columns that see nothing."""
    starts: list[int] = []
    stops: list[int] = []
    for length in lengths:
        at = len(starts)
        starts += [at] * abs(length)
        stops += range(at + 1, at + length + 1) if length > 0 else [at] * -length
    return torch.tensor([starts, stops], dtype=torch.int32)


def inputs_of(rows: int, dtype: torch.dtype, heads=4, groups=2, dim=16, indexer=(4, 16)) -> dict[str, torch.Tensor]:
    """[S, rows, ...] of NAMES, and the gradient of the output; on every rank the same."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(heads, dim), (groups, dim), (groups, dim), indexer, indexer[1:], indexer[:1], (heads * dim,)]
    draws = [torch.randn(S, rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return dict(zip((*NAMES, "grad_out"), draws))


def core_attention(mode: str, backend: str) -> SparseCoreAttention:
    """mode: an attention mode, or "without loss" for the sparse one in evaluation."""
    size = ps.get_context_parallel_world_size()
    attention_mode = "sparse" if mode == "without loss" else mode
    model = build_config("keye_mini", attention_mode=attention_mode, topk=TOPK, attention_backend=backend)
    config = language_config(model, ParallelConfig(context=size), indexer_loss_weight=0.5)
    groups = SimpleNamespace(cp=ps.get_context_parallel_group(), tp=ps.get_tensor_model_parallel_group())
    return SparseCoreAttention(config, 1, pg_collection=groups).train(mode != "without loss")


def run(mode: str, layout: str, rows: int, backend: str, dtype: torch.dtype, recompute: bool = False) -> dict:
    """This rank's part [s, rows, ...] of the output and the gradients."""
    rank, size = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
    local = {name: zigzag(x, rank, size, dim=0).clone() for name, x in inputs_of(rows, dtype).items()}
    leaves = [local[name].requires_grad_() for name in NAMES]
    ranges = zigzag(torch.stack([ranges_of(ROWS[layout][b]) for b in range(rows)], 1), rank, size, dim=2)
    core = core_attention(mode, backend)

    def attend(query, key, value, *indexer):
        return core(query, key, value, ranges, *(() if mode == "dense" else indexer))

    out = checkpoint(attend, *leaves, use_reentrant=True) if recompute else attend(*leaves)
    out.backward(local["grad_out"])
    grads = {f"gradient of {n}": x.grad for n, x in zip(NAMES, leaves) if x.grad is not None}
    return {"out": out.detach(), **grads}


def run_recorded(mode: str, layout: str, rows: int, *case) -> dict:
    """As `run`, and where the loss is taken the operator's KL [s, rows] and selection [s, rows, TOPK]."""
    seen: dict[str, torch.Tensor] = {}
    whole = dsa.dsa_attention

    def recording(*args, **kwargs):
        out, kl, indices = whole(*args, **kwargs, return_indices=True)
        for name, x in (("kl", kl), ("indices", indices)):
            if x is None:  # no loss was asked for
                continue
            seen[name] = x.detach().unflatten(0, (rows, -1)).transpose(0, 1)
        return out, kl

    dsa.dsa_attention = recording
    try:
        return {**run(mode, layout, rows, *case), **seen}
    finally:
        dsa.dsa_attention = whole
