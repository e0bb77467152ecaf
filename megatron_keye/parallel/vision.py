"""Independent ViT-LM parallelism: the vision tower's half of a training step.

The tower ignores the language model's layout. Every rank holds it whole, and a step has three phases:
1. encode: all frames of the step are dealt to the ranks of the block by cost; each encodes its share, keeping no
   activations, and embeddings go to the ranks that need them (first pipeline stage, by context shard);
2. the language model runs with those embeddings as leaves;
3. backward: their gradients return to the rank that encoded, which recomputes and backpropagates, chunk by chunk.
So the tower's activations are those of one chunk. A step without pictures makes the same calls, with nothing in them.

Shapes: F frames of the step, P patches, n picture tokens, h hidden of the language model.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
import torch.distributed as dist

from keye_data.processor import Processor
from keye_data.sample import Batch
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import visual_mask
from megatron_keye.model.projector import merged_tokens
from megatron_keye.parallel import context
from megatron_keye.parallel.plan import Plan


def frame_cost(patches: torch.Tensor, hidden: int) -> torch.Tensor:
    """Forward work of frames of n patches, up to a constant: 12 h n for the matrices, 2 n^2 for attention."""
    n = patches.double()
    return 12 * hidden * n + 2 * n * n


def deal(cost: torch.Tensor, ranks: int) -> torch.Tensor:
    """Longest first, each to the rank with least so far -> the rank of each frame, int64 [F]. Ties: lowest index."""
    owner = torch.zeros(len(cost), dtype=torch.int64)
    heap = [(0.0, rank) for rank in range(ranks)]
    for frame in torch.argsort(cost, descending=True, stable=True).tolist():
        load, rank = heapq.heappop(heap)
        owner[frame] = rank
        heapq.heappush(heap, (load + float(cost[frame]), rank))
    return owner


def imbalance(cost: torch.Tensor, owner: torch.Tensor, ranks: int) -> float:
    """Greatest load over mean load; 1.0 is perfect."""
    load = torch.zeros(ranks, dtype=torch.float64).index_add_(0, owner, cost)
    return float(load.max() / load.mean()) if len(cost) else 1.0


@dataclass
class Routes:
    """Which picture tokens go where in this step. Indices count tokens of the step, in row order of its batches."""

    mine: torch.Tensor  # tokens that this rank encodes, ascending
    send: list[torch.Tensor]  # per rank of the block: positions within `mine`
    receive: list[torch.Tensor]  # per rank of the block: positions within this rank's local tokens
    local_per_batch: list[int]


class VisionStep:
    """Used once a step: `encode`, then the language model, then `backward`."""

    def __init__(self, tower: VisionTower, plan: Plan, chunk_patches: int):
        self.tower, self.plan, self.chunk_patches = tower, plan, chunk_patches
        self.train_encoder = any(p.requires_grad for p in tower.vision_model.parameters())
        self.train_projector = any(p.requires_grad for p in tower.projector.parameters())
        self.imbalance = 1.0

    @property
    def trains(self) -> bool:
        return self.train_encoder or self.train_projector

    def encode(self, batches: list[Batch]) -> list[torch.Tensor]:
        """-> per batch the embeddings of this rank's picture tokens [n, h]; leaves that collect gradients."""
        grid = torch.cat([b.grid for b in batches])
        cost = frame_cost(grid.prod(-1), self.tower.config.hidden_size)
        owner = deal(cost, self.plan.block.size())
        self.imbalance = imbalance(cost, owner, self.plan.block.size())
        self._prepare_chunks(torch.cat([b.patches for b in batches]), grid, owner)
        self.routes = self._routes(batches, grid, owner)
        with torch.no_grad():
            encoded = [self._encode(chunk) for chunk in self.chunks]
        hidden, dtype = self.tower.config.keye.hidden_size, self.tower.config.params_dtype
        device = self.tower.projector.linear_2.weight.device
        mine = torch.cat([*encoded, torch.empty(0, hidden, dtype=dtype, device=device)])
        received = self._exchange([mine[index] for index in self.routes.send], [len(r) for r in self.routes.receive])
        local = received.new_empty(len(received), hidden)
        local[torch.cat(self.routes.receive)] = received
        self.leaves = [part.requires_grad_(self.trains) for part in local.split(self.routes.local_per_batch)]
        return self.leaves

    def backward(self) -> None:
        """Take the leaves' gradients to the ranks that encoded them, and backpropagate there."""
        if not self.trains:
            return
        grads = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves])
        # Tensor-parallel siblings hold equal gradients: one of them sends.
        speaks = self.plan.tensor_rank == 0
        send = [grads[index if speaks else index[:0]] for index in self.routes.receive]
        counts = [
            len(index) if self.plan.block_coordinates(rank)[0] == 0 else 0
            for rank, index in enumerate(self.routes.send)
        ]
        received = self._exchange(send, counts)
        mine = torch.zeros(len(self.routes.mine), received.shape[1], dtype=received.dtype, device=received.device)
        mine[torch.cat([index[:n] for index, n in zip(self.routes.send, counts)])] = received
        for chunk, grad in zip(self.chunks, mine.split([int(merged_tokens(c["grid"]).sum()) for c in self.chunks])):
            if self.train_projector or self.train_encoder:
                self._encode(chunk).backward(grad)

    def _encode(self, chunk: dict[str, torch.Tensor]) -> torch.Tensor:
        """A frozen encoder's features are kept: the way back stops at the projector."""
        if self.train_encoder:
            return self.tower(Processor.normalise(chunk["patches"]), chunk["grid"])
        if "features" not in chunk:
            with torch.no_grad():
                chunk["features"] = self.tower.vision_model(Processor.normalise(chunk["patches"]), chunk["grid"])
        return self.tower.projector(chunk["features"], chunk["grid"])

    def _prepare_chunks(self, patches: torch.Tensor, grid: torch.Tensor, owner: torch.Tensor) -> None:
        """This rank's frames, in order, cut so that a chunk holds at most `chunk_patches` (or one frame)."""
        lengths = grid.prod(-1)
        first = lengths.cumsum(0) - lengths
        self.chunks: list[dict[str, torch.Tensor]] = []
        frames: list[int] = []
        for frame in [*(owner == self.plan.block.rank()).nonzero()[:, 0].tolist(), None]:
            full = frames and (frame is None or lengths[[*frames, frame]].sum() > self.chunk_patches)
            if full:
                pixels = torch.cat([patches[first[f] : first[f] + lengths[f]] for f in frames])
                self.chunks.append({"patches": pixels, "grid": grid[frames]})
                frames = []
            if frame is not None:
                frames.append(frame)

    def _routes(self, batches: list[Batch], grid: torch.Tensor, owner: torch.Tensor) -> Routes:
        keye, config = self.tower.config.keye, self.plan.config
        encoder = owner.repeat_interleave(merged_tokens(grid, keye.merge_size))  # rank of each token
        holder_parts, batch_parts = [], []
        for i, batch in enumerate(batches):
            where = visual_mask(batch.input_ids, keye.image_token_id, keye.video_token_id).nonzero()[:, 1]
            holder_parts.append(
                context.owner(where, batch.input_ids.shape[1], config.context) if config.context > 1 else where * 0
            )
            batch_parts.append(torch.full_like(where, i))
        holder, batch_of = torch.cat(holder_parts).cpu(), torch.cat(batch_parts).cpu()
        me = self.plan.block.rank()
        mine = (encoder == me).nonzero()[:, 0]
        send = []
        for rank in range(self.plan.block.size()):
            _, context_rank, stage = self.plan.block_coordinates(rank)
            wanted = holder[mine] == context_rank if stage == 0 else torch.zeros(len(mine), dtype=torch.bool)
            send.append(wanted.nonzero()[:, 0])
        here = (holder == self.plan.context_rank) & self.plan.is_first_stage
        local = here.nonzero()[:, 0]
        receive = [(encoder[local] == rank).nonzero()[:, 0] for rank in range(self.plan.block.size())]
        per_batch = torch.bincount(batch_of[local], minlength=len(batches)).tolist()
        return Routes(mine, send, receive, per_batch)

    def _exchange(self, send: list[torch.Tensor], receive: list[int]) -> torch.Tensor:
        """Rows to and from every rank of the block."""
        outgoing = torch.cat(send)
        if self.plan.block.size() == 1:
            return outgoing
        incoming = outgoing.new_empty(sum(receive), outgoing.shape[1])
        dist.all_to_all_single(incoming, outgoing, receive, [len(s) for s in send], group=self.plan.block)
        return incoming
