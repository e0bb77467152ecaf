"""The example on the plan's page is what eight ranks find."""

from __future__ import annotations

import re

from launch import launch
from megatron.core import parallel_state as ps

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel import plan

EXAMPLE = ParallelConfig(tensor=2, pipeline=2, expert=2, expert_tensor=2)


def place() -> dict[str, int]:
    groups = plan.initialize(EXAMPLE)
    assert groups.block.size() == 4 and groups.block_ranks[groups.block.rank()] == groups.rank
    assert groups.block_coordinates(groups.block.rank()) == (
        groups.tensor_rank, groups.context_rank, ps.get_pipeline_model_parallel_rank()
    )  # fmt: skip
    return {
        "rank": groups.rank,
        "pipeline": ps.get_pipeline_model_parallel_rank(),
        "block": groups.data_rank,
        "tensor": groups.tensor_rank,
        "expert": ps.get_expert_model_parallel_rank(),
        "expert tensor": ps.get_expert_tensor_parallel_rank(),
    }


def test_the_example_is_true():
    told = {
        name.strip(): [int(number) for number in numbers.split()]
        for name, numbers in re.findall(r"^    (\w[\w ]*?)  +((?:\d ?){8})$", plan.__doc__ or "", re.MULTILINE)
    }
    found = launch(place, 8)
    assert told == {name: [rank[name] for rank in found] for name in found[0]}
