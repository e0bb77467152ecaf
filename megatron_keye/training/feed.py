"""One read for a whole block: its first rank reads and decodes, the blocks even out their work, the others are told.

Shapes: B packed rows of S tokens, P patches (see keye_data.sample.Batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps

from keye_data.sample import Batch
from megatron_keye.parallel.plan import Plan
from megatron_keye.parallel.together import together
from megatron_keye.training.rebalance import rebalance


class BlockFeed:
    """`batches` is an iterator on the block's source rank, and None on the others.

    `cost`: the work of a micro-batch, by which rows are dealt to the blocks; None leaves them where they were read.
    """

    def __init__(self, batches: Iterator[Batch] | None, plan: Plan, cost: Callable[[list[Batch]], float] | None = None):
        self.batches, self.plan, self.cost = batches, plan, cost
        self.device = torch.device(torch.cuda.current_device())
        # Of the last step, where this rank reads: standing still for want of a batch, and decoding.
        self.wait_ms = self.decode_ms = 0.0

    def take(self, count: int) -> list[Batch]:
        """The next `count` micro-batches, on this rank's device, the same on every rank of the block."""
        taken = together(lambda: self._read(count))
        if self.cost is not None and self.batches is not None and self.plan.data_size > 1:
            costs = [self.cost([b]) for b in taken]
            taken = rebalance(taken, costs, ps.get_data_parallel_group(), self.device)
        if self.plan.block.size() > 1:
            patches = [b.patches for b in taken]
            outline: list[Any] = [[replace(b, patches=torch.empty(0)) for b in taken], [len(p) for p in patches]]
            dist.broadcast_object_list(outline, src=self.plan.block_source, group=self.plan.block)
            taken = self._share_patches(outline[0], patches, outline[1])
        return [to_device(b, self.device) for b in taken]

    def _read(self, count: int) -> list[Batch]:
        if self.batches is None:
            return []
        begin = time.perf_counter()
        taken = [next(self.batches) for _ in range(count)]
        self.wait_ms = (time.perf_counter() - begin) * 1000
        self.decode_ms = sum(batch.decode_ms for batch in taken)
        return taken

    def _share_patches(self, batches: list[Batch], patches: list[torch.Tensor], lengths: list[int]) -> list[Batch]:
        pixels = torch.empty(sum(lengths), 3, 14, 14, dtype=torch.uint8, device=self.device)
        if self.batches is not None:
            pixels.copy_(torch.cat(patches))
        dist.broadcast(pixels, src=self.plan.block_source, group=self.plan.block)
        return [replace(b, patches=part) for b, part in zip(batches, pixels.split(lengths))]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Everything but the grid, which the host plans with."""
    moved = {
        n: getattr(batch, n).to(device)
        for n in ["input_ids", "targets", "position_ids", "key_start", "key_stop", "patches"]
    }
    return replace(batch, **moved)
