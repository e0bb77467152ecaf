"""The parallel plan on one page: every process group, and who holds what.

The world is laid out twice. For all but experts: pipeline x data x context x tensor, the last fastest. For experts:
pipeline x expert data x expert x expert tensor. A *block* is the tensor x context x pipeline ranks that work on the same
rows; there are `data` blocks. The ranks of one node are neighbours, so what talks most (tensor, then experts) stays there.

| what                       | cut over                                       | gradients summed over          |
|----------------------------|------------------------------------------------|--------------------------------|
| rows of a step             | data; within a block all ranks see the same    |                                |
| tokens of a row            | context (zigzag), then tensor between matrices |                                |
| attention, embedding, head | tensor: heads, vocabulary                      | data x context                 |
| router, norms              | nobody; each tensor rank sees its tokens       | data x context, and tensor     |
| indexers                   | nobody; each tensor rank sees all tokens       | data x context; tensor: mean   |
| experts                    | expert: whole ones; expert tensor: their width | expert data: equal experts     |
| layers                     | pipeline; interleaved: several runs of layers  |                                |
| vision encoder, projector  | nobody: whole on every rank                    | the world                      |
| pictures and frames        | the ranks of a block, by cost                  |                                |
| optimizer states           | the ranks that sum the gradients               |                                |

Eight ranks with tensor 2, pipeline 2, expert 2, expert tensor 2 and so data 2:
    rank            0 1 2 3 4 5 6 7
    pipeline        0 0 0 0 1 1 1 1
    block           0 0 1 1 0 0 1 1
    tensor          0 1 0 1 0 1 0 1
    expert          0 0 1 1 0 0 1 1
    expert tensor   0 1 0 1 0 1 0 1
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel.world import join_world, shut_down, single_process

__all__ = ["Plan", "initialize", "shut_down", "single_process"]


@dataclass
class Plan:
    """This rank's place, and the groups that Megatron does not make by itself."""

    config: ParallelConfig
    block: dist.ProcessGroup  # the ranks that see the same rows
    block_ranks: list[int]
    vision: ProcessGroupCollection  # for the modules that every rank holds whole

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def data_rank(self) -> int:
        return ps.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        return ps.get_data_parallel_world_size()

    @property
    def context_rank(self) -> int:
        return ps.get_context_parallel_rank()

    @property
    def tensor_rank(self) -> int:
        return ps.get_tensor_model_parallel_rank()

    @property
    def is_first_stage(self) -> bool:
        return ps.is_pipeline_first_stage(ignore_virtual=True)

    @property
    def is_last_stage(self) -> bool:
        return ps.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def block_source(self) -> int:
        """The global rank that reads data for its block."""
        return self.block_ranks[0]

    def block_coordinates(self, index: int) -> tuple[int, int, int]:
        """(tensor, context, pipeline) of the block's rank `index`."""
        tensor, context = self.config.tensor, self.config.context
        return index % tensor, index // tensor % context, index // (tensor * context)


def initialize(config: ParallelConfig, seed: int = 1234, timeout_minutes: float = 10.0) -> Plan:
    """Make every group. Uses the environment of torchrun; without it, one process."""
    timeout = timedelta(minutes=timeout_minutes)
    join_world(timeout)
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.expert_tensor,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    block, block_ranks = _block_group(config, timeout)
    return Plan(config, block, block_ranks, _vision_groups(timeout))


def _block_group(config: ParallelConfig, timeout: timedelta) -> tuple[dist.ProcessGroup, list[int]]:
    inner = config.tensor * config.context
    data = dist.get_world_size() // (inner * config.pipeline)
    mine = None
    for d in range(data):
        ranks = [i + inner * (d + data * p) for p in range(config.pipeline) for i in range(inner)]
        group = dist.new_group(ranks, timeout)
        if dist.get_rank() in ranks:
            mine = group, ranks
    assert mine is not None
    return mine


def _vision_groups(timeout: timedelta) -> ProcessGroupCollection:
    """Groups under which every rank holds the whole module and gradients are summed over the world."""
    world = dist.new_group(list(range(dist.get_world_size())), timeout)
    alone = None
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank], timeout)
        if rank == dist.get_rank():
            alone = group
    groups = ProcessGroupCollection()
    for name in ["tp", "cp", "pp", "mp", "ep", "tp_cp", "expt_tp", "tp_ep", "tp_ep_pp", "expt_dp", "intra_expt_dp"]:
        setattr(groups, name, alone)
    for name in ["dp", "dp_cp", "intra_dp_cp", "intra_dist_opt", "tp_dp_cp"]:
        setattr(groups, name, world)
    groups.embd = groups.pos_embd = None
    return groups
