"""The `parallel` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """How the world is cut. World size = tensor x context x pipeline x data; experts are spread over context x data."""

    tensor: int = 1  # sequence parallelism is on whenever tensor > 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    expert: int = 1
    expert_tensor: int = 1
    dispatcher: str = "alltoall"  # how tokens reach their experts: alltoall | allgather | flex (DeepEP; CUDA)
