"""Context parallelism: the core attention of CP = 2 and 4 ranks equals that of one.

Bounds are on the norm of the difference over the norm. The ranks cut the queries otherwise and add the gradients of keys
across ranks, so sums are taken in another order and in one more rounding a rank; nothing else may differ. Selections are
equal exactly: the scores of the keys are the same products, and the draws hold no two scores within rounding of one
another at the threshold.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from launch import launch
from megatron.core import parallel_state as ps
from sharded_attention import NAMES, ROWS, run_recorded

from keye_kernels.dsa.torch_backend import chunks
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel import context, plan
from megatron_keye.parallel.context import gather_keys, zigzag

BOUNDS = {
    torch.float64: 1e-13,  # 2^-53 = 1.1e-16 a rounding
    torch.float32: 1e-5,  # 2^-24 = 6e-8
    torch.bfloat16: 1e-2,  # 2^-9 = 2e-3: each rank's gradient is rounded, and so is their sum
}
CASES = [
    (mode, layout, rows, backend, torch.float64, False)
    for mode in ("sparse", "warmup", "without loss", "dense")
    for layout in ROWS
    for rows in (1, 2)
    for backend in ("torch", "reference")
]
CASES += [(mode, "packed", 2, "torch", dtype, False) for mode in ("sparse", "warmup") for dtype in BOUNDS]
RECOMPUTED = [(mode, layout, 2, "torch", torch.float64, True) for mode in ("sparse", "warmup") for layout in ROWS]
CASES = list(dict.fromkeys(CASES + RECOMPUTED))


def run_all(size: int) -> dict[tuple, dict]:
    plan.initialize(ParallelConfig(context=size))
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN: what is read too early shows
    chunks.PAIRS_PER_CHUNK, chunks.ROWS = 500, (1, 16)  # several chunks
    return {case: run_recorded(*case) for case in CASES}


@cache
def results(size: int) -> list[dict[tuple, dict]]:
    return launch(run_all, size, size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_equals_one_rank(case: tuple, size: int):
    mode, layout, *_, dtype, _ = case
    (one,), ranks = results(1), results(size)
    expected_names = {"out", *(f"gradient of {n}" for n in NAMES[: 6 if mode in ("sparse", "warmup") else 3])}
    expected_names |= {"kl", "indices"} if mode in ("sparse", "warmup") else set()
    expected_names |= {"indices"} if mode == "without loss" else set()
    assert one[case].keys() == expected_names
    for rank, got in enumerate(ranks):
        assert got[case].keys() == expected_names
        for name, whole in one[case].items():
            expected, mine = zigzag(whole, rank, size, dim=0), got[case][name]
            assert mine.shape == expected.shape and mine.dtype == expected.dtype
            if name == "indices":
                assert torch.equal(mine, expected), f"selection of rank {rank}"
                continue
            difference = (mine - expected).double().norm()
            # over the whole row's norm: a shard that sees nothing has a norm of zero
            assert difference <= BOUNDS[dtype] * whole.double().norm(), f"{name} of rank {rank}: {difference}"
            if layout == "blind shards" and rank > 0 and name in ("out", "kl"):
                assert not mine.any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_recomputation_changes_no_bit(size: int):
    for rank in results(size):
        for case in RECOMPUTED:
            for name, expected in rank[(*case[:-1], False)].items():
                assert torch.equal(rank[case][name], expected), (case, name)


def test_the_comparison_sees_a_key_in_the_wrong_place():
    """Gathered in the order of the ranks and not of the row, nothing would be the same."""
    case = CASES[0]
    (one,) = results(1)
    (wrong, _) = launch(run_in_rank_order, 2, case)
    expected = zigzag(one[case]["out"], 0, 2, dim=0)
    assert (wrong["out"] - expected).norm() > 0.1 * expected.norm()


def run_in_rank_order(case: tuple) -> dict:
    plan.initialize(ParallelConfig(context=2))
    same_tokens = context._same_tokens
    context._same_tokens = lambda whole, shards: zip(
        [chunk for chunk, _ in sorted(same_tokens(whole, shards), key=lambda pair: pair[0].storage_offset())],
        [half for shard in shards for half in shard.split(len(shard) // 2)],
    )
    return run_recorded(*case)


def gather_by_definition(size: int) -> tuple[bool, bool]:
    """Forward against all ranks' parts put back by hand; backward against the all-reduced gradient's own part."""
    plan.initialize(ParallelConfig(context=size))
    rank, group = ps.get_context_parallel_rank(), ps.get_context_parallel_group()
    whole = torch.randn(2, 24, 3, 5, generator=torch.Generator().manual_seed(0))  # [parts, S, b, n]
    leaf = zigzag(whole, rank, size, dim=1).clone().requires_grad_()
    tensors, wait = gather_keys(group, *leaf.unbind())
    wait()
    rows = whole.transpose(1, 2).flatten(1, 2)
    grads = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1 + rank))
    torch.autograd.backward(tensors, list(grads))
    dist.all_reduce(grads, group=group)
    expected = zigzag(grads.unflatten(1, (3, 24)).transpose(1, 2), rank, size, dim=1)
    return torch.equal(torch.stack(tensors), rows), torch.allclose(leaf.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gather_and_its_backward(size: int):
    assert launch(gather_by_definition, size, size) == [(True, True)] * size
