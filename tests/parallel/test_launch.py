"""The rank runner itself: results in order, and failures that say what happened."""

from __future__ import annotations

import gc
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel import plan
from tests.parallel.launch import launch


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    where = plan.initialize(ParallelConfig(tensor=2))
    total = torch.tensor([float(where.rank + offset)])
    dist.all_reduce(total, group=where.block)
    return where.tensor_rank, total.item()


def test_results_by_rank_after_groups_in_the_parent():
    plan.single_process()
    assert launch(_sum_of_ranks, 2, 10, timeout=10) == [(0, 21.0), (1, 21.0)]
    assert launch(_sum_of_ranks, 4, 0) == [(0, 1.0), (1, 1.0), (0, 5.0), (1, 5.0)]


def test_no_group_outlives_its_shut_down():
    """Megatron's own log of balance losses holds the groups that it sums over."""
    plan.shut_down()
    plan.single_process()
    group = parallel_state.get_tensor_model_parallel_group()
    moe_utils.save_to_aux_losses_tracker("balance", torch.zeros(()), 1, 1, reduce_group=group)
    del group
    groups = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
    assert len(groups) > 5
    plan.shut_down()
    gc.collect()
    assert [group() for group in groups if group() is not None] == []


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such layer")
    dist.barrier()


def _hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def _die() -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("fn", "said"),
    [(_fail_on_rank_1, "rank 1 failed:.*ValueError: no such layer"), (_hang, "(?s)rank 0.*barrier.*rank 1.*in _hang"), (_die, "code 3")],
    ids=["raises", "hangs", "dies"],
)  # fmt: skip
def test_failures_are_named(fn, said):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        launch(fn, 2, timeout=3)
    assert time.monotonic() - began < 15
