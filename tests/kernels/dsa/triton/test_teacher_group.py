"""Two tensor-parallel ranks with half the heads each: the same selection, loss and indexer gradients as one process with all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from keye_kernels import dsa
from keye_kernels.dsa.triton_backend import blocks, fused

TOPK = 9


def _rank(rank: int, store: str, mode: str, inputs: list, marks: tuple, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        blocks.PAIRS_PER_CHUNK = fused.PAIRS_PER_CHUNK = 4000  # several chunks, so several collectives
        torch.save(_run(mode, inputs, marks, rank, dist.group.WORLD), f"{results}{rank}")
    finally:
        dist.destroy_process_group()


def _run(mode, inputs, marks, rank=None, group=None) -> dict:
    q, k, v, *indexer = inputs
    if rank is not None:  # this rank's half of the query heads and of the KV heads
        q, k, v = q.chunk(2, dim=1)[rank], k.chunk(2, dim=1)[rank], v.chunk(2, dim=1)[rank]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *indexer)]
    out, kl, indices = dsa.dsa_attention(
        *leaves, *marks, TOPK, mode, "triton", deterministic=True, teacher_group=group, return_indices=True
    )
    (out.square().sum() + (kl * torch.linspace(0.5, 1.5, len(kl))).sum()).backward()
    tensors = (indices, out.detach(), kl.detach(), *(leaf.grad for leaf in leaves))
    return dict(zip(("indices", "out", "kl", "q", "k", "v", "iq", "ik", "iw"), tensors))


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_equals_one_process(mode, layout, make_inputs, tmp_path, interpreted):
    if not interpreted:
        pytest.skip("two ranks share gradients by gloo on a CPU: runs interpreted")
    num_queries, num_keys, *marks = layout("packed")
    inputs = [x.float() for x in make_inputs(num_queries, num_keys, heads=(4, 2))]
    whole = _run(mode, inputs, marks)
    results = str(tmp_path / "rank")
    mp.start_processes(
        _rank, (str(tmp_path / "store"), mode, inputs, marks, results), nprocs=2, start_method="fork"
    )  # fmt: skip
    ranks = [torch.load(f"{results}{rank}") for rank in range(2)]
    # 1e-5: float32 sums in another order, over ranks instead of over heads
    for name in ("out", "q", "k", "v"):
        joined = torch.cat([r[name] for r in ranks], dim=1)
        assert (joined - whole[name]).norm() <= 1e-5 * whole[name].norm(), name
    for name in ("indices", "kl", "iq", "ik", "iw"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    assert torch.equal(ranks[0]["indices"], whole["indices"])
    for name in ("kl", "iq", "ik", "iw"):
        assert (ranks[0][name] - whole[name]).norm() <= 1e-5 * whole[name].norm(), name
