"""Two ranks with half the heads each, against one process with all: same loss, same indexer gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from keye_kernels import dsa
from keye_kernels.dsa.torch_backend import chunks

TOPK = 9


def _rank(rank: int, store: str, backend: str, mode: str, inputs: list, marks: tuple, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        chunks.PAIRS_PER_CHUNK = 500  # several chunks, so several collectives
        torch.save(_run(backend, mode, inputs, marks, rank, dist.group.WORLD), f"{results}{rank}")
    finally:
        dist.destroy_process_group()


def _run(backend, mode, inputs, marks, rank=None, group=None) -> dict:
    q, k, v, *indexer = inputs
    if rank is not None:  # this rank's half of the query heads and of the KV heads
        q, k, v = q.chunk(2, dim=1)[rank], k.chunk(2, dim=1)[rank], v.chunk(2, dim=1)[rank]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *indexer)]
    out, kl = dsa.dsa_attention(*leaves, *marks, TOPK, mode, backend, teacher_group=group)
    (out.square().sum() + (kl * torch.linspace(0.5, 1.5, len(kl), dtype=kl.dtype)).sum()).backward()
    tensors = (out.detach(), kl.detach(), *(leaf.grad for leaf in leaves))
    return dict(zip(("out", "kl", "q", "k", "v", "iq", "ik", "iw"), tensors))


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_one_process(backend, mode, layout, make_inputs, tmp_path):
    num_queries, num_keys, *marks = layout("packed")
    inputs = make_inputs(num_queries, num_keys, heads=(8, 2))
    whole = _run(backend, mode, inputs, marks)
    results = str(tmp_path / "rank")
    arguments = (str(tmp_path / "store"), backend, mode, inputs, marks, results)
    mp.start_processes(_rank, arguments, nprocs=2, start_method="fork")
    ranks = [torch.load(f"{results}{rank}") for rank in range(2)]
    for name in ("out", "q", "k", "v"):
        torch.testing.assert_close(torch.cat([r[name] for r in ranks], dim=1), whole[name], rtol=1e-10, atol=1e-12)
    for name in ("kl", "iq", "ik", "iw"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], whole[name], rtol=1e-10, atol=1e-12)
