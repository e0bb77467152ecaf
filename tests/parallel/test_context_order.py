"""What context parallelism calls, and when: K and V travel while the first keys are scored and selected.

The calls recorded here are the real ones, of torch.distributed and of the torch backend, in the order they are made.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import launch
from sharded_attention import run

from keye_kernels.dsa.torch_backend import chunks, fused
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.parallel import plan


def kind(x: torch.Tensor) -> str:
    return "ik" if x.dim() == 4 else "K and V"  # packed as [parts, s, b, Di] or [parts, s, b, G, D]


def trace(mode: str, layout: str) -> list[str]:
    """The order of the real calls of one forward and backward of the core attention."""
    plan.initialize(ParallelConfig(context=2))
    chunks.PAIRS_PER_CHUNK, chunks.ROWS = 500, (1, 16)
    calls: list[str] = []
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    class Work:
        def __init__(self, work, of: str):
            self.work, self.of = work, of

        def wait(self):
            self.work.wait()
            calls.append(f"{self.of} here")

    def recording_gather(output, x, group=None, async_op=False):
        assert async_op
        calls.append(f"gather {kind(x)}")
        return Work(gather(output, x, group=group, async_op=True), kind(x))

    def recording_scatter(output, x, group=None):
        calls.append(f"reduce-scatter {kind(x)}")
        return scatter(output, x, group=group)

    def recorded(function, name: str):
        def call(*args):
            calls.append(name)
            return function(*args)

        return call

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = recording_gather, recording_scatter
    fused.index_scores = recorded(fused.index_scores, "score")
    fused.select = recorded(fused.select, "select")
    fused.logits_of = recorded(fused.logits_of, "attend")
    run(mode, layout, 2, "torch", torch.float32)
    return calls


@pytest.mark.parametrize("mode", ["sparse", "warmup"])
def test_the_gather_of_k_and_v_is_behind_the_selection(mode: str):
    ahead = {"sparse": ["score", "select"], "warmup": ["score"]}[mode]  # warm-up selects nothing
    for calls in launch(trace, 2, mode, "packed"):
        first = ["gather ik", "gather K and V", "ik here", *ahead, "K and V here", "attend"]
        second = [*ahead, "attend"]  # the second chunk waits for nothing
        assert calls[: len(first + second)] == first + second
        assert sorted(calls[-2:]) == ["reduce-scatter K and V", "reduce-scatter ik"]
        assert calls.count("K and V here") == calls.count("ik here") == 1


def test_a_rank_that_sees_nothing_makes_the_same_collectives():
    seeing, blind = (
        [call for call in calls if call not in ("score", "select", "attend")]
        for calls in launch(trace, 2, "sparse", "blind shards")
    )
    assert seeing == blind
    assert seeing[:4] == ["gather ik", "gather K and V", "ik here", "K and V here"]
