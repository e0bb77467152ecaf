"""The rank runner itself: results in order, and failures that say what happened."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

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
