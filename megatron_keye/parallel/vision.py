"""Independent ViT-LM parallelism: the vision tower's half of a training step.

The tower ignores the language model's layout. Every rank holds it whole, and a step has three phases:
1. encode: all frames of the step are dealt to the ranks of the block by cost; each encodes its share, keeping no
   activations, and every embedding goes to the one rank that needs it: first pipeline stage, by context shard and by
   the tensor rank's part of that;
2. the language model runs with those embeddings as leaves;
3. backward: their gradients return to the rank that encoded, which recomputes and backpropagates, chunk by chunk.
So the tower's activations are those of one chunk, and what grows with the frames of a step is pixels, embeddings and
gradients of embeddings. A step without pictures makes the same calls, with nothing in them.

Shapes: F frames of the step, P patches, n picture tokens, h hidden of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from keye_data.sample import Batch, pixel_values
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import visual_mask
from megatron_keye.model.projector import merged_tokens
from megatron_keye.parallel import context
from megatron_keye.parallel.balance import deal, frame_cost
from megatron_keye.parallel.plan import Plan


@dataclass
class Frame:
    """Of this rank's share: patches first <= p < last of a batch."""

    batch: Batch
    first: int
    last: int
    grid: torch.Tensor  # int64 [2]


@dataclass
class Chunk:
    """Frames that are encoded together, and their picture tokens first <= t < last of this rank's share."""

    frames: list[Frame]
    first: int
    last: int
    features: torch.Tensor | None = (
        None  # [P, vision hidden]; kept where the encoder is frozen and the projector is not
    )

    @property
    def grid(self) -> torch.Tensor:
        return torch.stack([frame.grid for frame in self.frames])

    def pixels(self) -> torch.Tensor:
        """[P, 3, 14, 14], normalised"""
        return pixel_values(torch.cat([f.batch.patches[f.first : f.last] for f in self.frames]))


@dataclass
class Routes:
    """Which picture tokens go where in this step. Indices count tokens of the step, in row order of its batches."""

    send: list[torch.Tensor]  # per rank of the block: positions within what this rank encodes
    receive: list[torch.Tensor]  # per rank of the block: positions within what this rank needs
    needed_per_batch: list[int]


class VisionStep:
    """Used once a step: `encode`, then the language model, then `backward`.

    `balance` False leaves the frames of a batch together, on one rank after another: for comparison.
    """

    def __init__(self, tower: VisionTower, plan: Plan, chunk_patches: int, balance: bool = True):
        self.tower, self.plan, self.chunk_patches, self.balance = tower, plan, chunk_patches, balance
        self.train_encoder = any(p.requires_grad for p in tower.vision_model.parameters())
        self.train_projector = any(p.requires_grad for p in tower.projector.parameters())
        self.load = 0.0  # this rank's share of the last step, as frame_cost counts
        self._began, self._encoded = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    @property
    def trains(self) -> bool:
        return self.train_encoder or self.train_projector

    @property
    def encode_ms(self) -> float:
        """How long this rank took for its share in the last step, without the exchange. To be asked after the step."""
        return self._began.elapsed_time(self._encoded)

    @torch.no_grad()
    def encode(self, batches: list[Batch]) -> list[torch.Tensor]:
        """-> per batch the embeddings of the picture tokens that this rank needs [n, h]; leaves that collect gradients."""
        owner = self._deal(batches)
        self.chunks = self._chunks(batches, owner)
        self.routes = self._routes(batches, owner)
        mine = self._rows(self.chunks[-1].last if self.chunks else 0)
        self._began.record()
        for chunk in self.chunks:
            mine[chunk.first : chunk.last] = self._encode(chunk)
        self._encoded.record()
        needed = self._exchange(mine, self.routes.send, self.routes.receive)
        # `.data`: no views, which would keep `needed` when they are let go.
        self.leaves = [part.data for part in needed.split(self.routes.needed_per_batch)]
        if self.trains:
            self.gradient = torch.zeros_like(needed)
            for leaf, gradient in zip(self.leaves, self.gradient.split(self.routes.needed_per_batch)):
                leaf.requires_grad_().grad = gradient  # all in one piece, ready to be sent
        return self.leaves

    def backward(self) -> None:
        """Take the leaves' gradients to the ranks that encoded them, and backpropagate there."""
        chunks, leaves = self.chunks, self.leaves
        self.leaves, self.chunks = [], []  # nothing of this step outlives it
        if not self.trains:
            return
        gradient = self._exchange(self.gradient, self.routes.receive, self.routes.send)
        del self.gradient
        for (
            leaf
        ) in leaves:  # Megatron's dispatcher keeps the end of a finished graph until the next, and so would these be
            leaf.grad, leaf.data = None, leaf.new_empty(0)
        for chunk in chunks:
            self._encode(chunk).backward(gradient[chunk.first : chunk.last])
            chunk.features = None

    def _encode(self, chunk: Chunk) -> torch.Tensor:
        """[n, h]. A frozen encoder's features are kept: the way back stops at the projector."""
        if self.train_encoder or not self.trains:
            return self.tower(chunk.pixels(), chunk.grid)
        if chunk.features is None:
            with torch.no_grad():
                chunk.features = self.tower.vision_model(chunk.pixels(), chunk.grid)
        return self.tower.projector(chunk.features, chunk.grid)

    def _rows(self, count: int) -> torch.Tensor:
        weight = self.tower.projector.linear_2.weight
        return torch.empty(count, weight.shape[0], dtype=weight.dtype, device=weight.device)

    def _deal(self, batches: list[Batch]) -> torch.Tensor:
        """The rank, within the block, of every frame of the step, int64 [F]."""
        ranks = self.plan.block.size()
        cost = frame_cost(torch.cat([b.grid for b in batches]).prod(-1), self.tower.config.keye)
        if self.balance:
            owner = deal(cost, ranks)
        else:
            owner = torch.cat([torch.full((len(b.grid),), i % ranks, dtype=torch.int64) for i, b in enumerate(batches)])
        self.load = float(cost[owner == self.plan.block.rank()].sum())
        return owner

    def _chunks(self, batches: list[Batch], owner: torch.Tensor) -> list[Chunk]:
        """This rank's frames, in order, cut so that a chunk holds at most `chunk_patches` (or one frame)."""
        frames: list[Frame] = []
        for batch, its_owner in zip(batches, owner.split([len(b.grid) for b in batches])):
            ends = batch.grid.prod(-1).cumsum(0).tolist()
            for i in (its_owner == self.plan.block.rank()).nonzero()[:, 0].tolist():
                frames.append(Frame(batch, ends[i - 1] if i else 0, ends[i], batch.grid[i]))
        chunks: list[Chunk] = []
        room = token = 0
        for frame in frames:
            patches = frame.last - frame.first
            if not chunks or patches > room:
                chunks.append(Chunk([], token, token))
                room = self.chunk_patches
            room -= patches
            token += patches // self.tower.config.keye.merge_size**2
            chunks[-1].frames.append(frame)
            chunks[-1].last = token
        return chunks

    def _routes(self, batches: list[Batch], owner: torch.Tensor) -> Routes:
        """From who encodes each token and who needs it."""
        keye, me = self.tower.config.keye, self.plan.block.rank()
        grid = torch.cat([b.grid for b in batches])
        encoder = owner.repeat_interleave(merged_tokens(grid, keye.merge_size))
        needs, batch_of = [], []
        for i, batch in enumerate(batches):
            column = visual_mask(batch.input_ids, keye.image_token_id, keye.video_token_id).nonzero()[:, 1].cpu()
            needs.append(self._holder(column, batch.input_ids.shape[1]))
            batch_of.append(torch.full_like(column, i))
        holder = torch.cat(needs)
        here = (holder == me).nonzero()[:, 0]
        mine = (encoder == me).nonzero()[:, 0]
        return Routes(
            send=_by_rank(holder[mine], self.plan.block.size()),
            receive=_by_rank(encoder[here], self.plan.block.size()),
            needed_per_batch=torch.bincount(torch.cat(batch_of)[here], minlength=len(batches)).tolist(),
        )

    def _holder(self, column: torch.Tensor, length: int) -> torch.Tensor:
        """The rank of the block, on its first stage, that holds each column of a row of `length` tokens."""
        tensor, size = self.plan.config.tensor, self.plan.config.context
        context_rank, local = context.place(column, length, size)
        return context_rank * tensor + local // (length // (size * tensor))

    def _exchange(self, rows: torch.Tensor, send: list[torch.Tensor], receive: list[torch.Tensor]) -> torch.Tensor:
        """`rows` [n, h] at positions send[r] to rank r -> what came from it, at positions receive[r]."""
        if self.plan.block.size() == 1:
            return rows  # both orders are that of the tokens
        outgoing = rows[torch.cat(send).to(rows.device)]
        incoming = self._rows(sum(len(r) for r in receive))
        sizes = [len(r) for r in receive], [len(s) for s in send]
        dist.all_to_all_single(incoming, outgoing, *sizes, group=self.plan.block)
        del outgoing
        arrived = torch.empty_like(incoming)
        arrived[torch.cat(receive).to(rows.device)] = incoming
        return arrived


def _by_rank(rank_of: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """For every rank the positions at which it is named, ascending."""
    return list(rank_of.argsort(stable=True).split(torch.bincount(rank_of, minlength=ranks).tolist()))
