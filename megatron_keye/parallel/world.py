"""Joining the world of ranks, and leaving it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.transformer.moe import moe_utils


def join_world(timeout: timedelta) -> None:
    """By the environment of torchrun; without it, a world of one. NCCL with CUDA, gloo without."""
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(backend, timeout=timeout)


def single_process() -> None:
    """Groups of one, for notebooks, tools and tests; does nothing where groups exist already."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)


def shut_down() -> None:
    """Leave the groups in order, so that a following run in the same process can make its own.

    Megatron forgets some: one of its own, and those by which balance losses are logged. A group that is left is destroyed
    whenever its last holder goes, and in a process forked by then that waits for ever, for threads that no fork copies.
    """
    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    for name, value in list(vars(ps).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(ps, name, None)
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    if dist.is_initialized():
        dist.destroy_process_group()
