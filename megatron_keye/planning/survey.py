"""Two small traces of a pipeline stage, and what follows for the whole of it.

Layers are alike and micro-batches are alike, so a stage is what one layer and one micro-batch take, plus what each further
one adds. Both are differences of traces. A stage of a pipeline holds, beside the micro-batch it works on, what others that
are in flight have left for their backward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from keye_data.sample import IGNORE, Batch
from megatron_keye.config.recipe import Recipe
from megatron_keye.planning.ledger import Phase, Sent, Work
from megatron_keye.planning.trace import Phases, small, traced

IN_FLIGHT, PIXELS = "micro-batches in flight", "pixels"


@dataclass
class Cost:
    """Bytes at the peak by place, work and traffic. Costs add up, with multiples."""

    memory: Counter[str] = field(default_factory=Counter)
    work: Counter[Work] = field(default_factory=Counter)
    sent: Counter[Sent] = field(default_factory=Counter)

    def plus(self, other: Cost, times: float = 1) -> Cost:
        return Cost(
            summed(self.memory, other.memory, times),
            summed(self.work, other.work, times),
            summed(self.sent, other.sent, times),
        )

    def minus(self, other: Cost) -> Cost:
        return self.plus(other, -1)

    @property
    def peak(self) -> int:
        return round(sum(self.memory.values()))

    def flops(self, *kinds: str) -> float:
        return sum(w.flops * n for w, n in self.work.items() if w.kind in kinds or not kinds)


def summed(a: Counter, b: Counter, times: float) -> Counter:
    total = Counter(a)
    for key, count in b.items():
        total[key] += times * count  # type: ignore[assignment]
    return total


def cost_of(phase: Phase | None) -> Cost:
    return Cost() if phase is None else Cost(Counter(phase.at_peak), Counter(phase.work), Counter(phase.sent))


@dataclass
class Survey:
    """Of one stage: costs of the language model's part, and of the vision tower's."""

    language: Cost  # of one micro-batch through one layer, with embedding and head where the stage has them
    layer: Cost  # what one more layer adds
    micro_batch: Counter[str]  # bytes that one more micro-batch adds there: pixels, embeddings and their gradients
    held: int  # bytes of one layer's micro-batch between forward and backward ...
    held_layer: int  # ... and of each layer more
    encode: Cost  # of `vision_batches` micro-batches through one vision layer
    vision_backward: Cost
    encode_layer: Cost
    vision_backward_layer: Cost
    encode_batch: Counter[str]  # bytes that one more micro-batch adds
    vision_backward_batch: Counter[str]
    reduce: Cost  # once a step
    reduce_layer: Cost
    vision_batches: int
    pixels: int  # bytes of a micro-batch's, held by every rank of the block
    block: int  # ranks that share the pictures in the trace

    def stage(self, layers: int, micro_batches: int, waiting: int = 0) -> Cost:
        """Memory of the language part with all its layers, and `waiting` bytes of other micro-batches; work and traffic of one."""
        one = self.language.plus(self.layer, layers - 1)
        one.memory = summed(one.memory, self.micro_batch, micro_batches - 1)
        one.memory[IN_FLIGHT] += waiting
        return one

    def waiting(self, layers: int) -> int:
        """Bytes of a micro-batch through so many layers that waits for its backward."""
        return self.held + (layers - 1) * self.held_layer

    def vision(self, layers: int, micro_batches: float) -> tuple[Cost, Cost]:
        """Encoding and its backward for all pictures of `micro_batches`, by a rank of the traced block."""
        more, times = micro_batches - self.vision_batches, micro_batches / self.vision_batches
        encode = Cost().plus(self.encode.plus(self.encode_layer, layers - 1), times)
        encode.memory = summed(self.encode.memory, self.encode_batch, more)  # nothing is kept of any layer
        backward = Cost().plus(self.vision_backward.plus(self.vision_backward_layer, layers - 1), times)
        memory = summed(self.vision_backward.memory, self.vision_backward_layer.memory, layers - 1)
        backward.memory = summed(memory, self.vision_backward_batch, more)
        return encode, backward


def planned_batch(recipe: Recipe, pictures: bool = True) -> Batch:
    """A micro-batch of full rows, each one document; with pictures, as many frames of the largest size as a row may have.

    Pixels have no content.
    """
    rows, length, cfg, data = recipe.training.micro_batch_size, recipe.data.seq_length, recipe.model, recipe.data
    frame = data.video.max_frame_tokens
    frames = min(max(data.video.total_tokens, data.image.max_tokens), 3 * length // 4) // frame if pictures else 0
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ids[:, : frames * frame] = cfg.video_token_id
    stop = torch.arange(1, length + 1, dtype=torch.int32).repeat(rows, 1)
    targets = torch.zeros_like(ids)
    targets[:, -1] = IGNORE
    side = cfg.merge_size
    return Batch(
        input_ids=ids,
        targets=targets,
        position_ids=torch.zeros(3, rows, length, dtype=torch.int64),
        key_start=torch.zeros_like(stop),
        key_stop=stop,
        patches=torch.empty(rows * frames * frame * side**2, 3, cfg.patch_size, cfg.patch_size, dtype=torch.uint8, device="meta"),
        grid=torch.tensor([[side, side * frame]] * (rows * frames), dtype=torch.int64).reshape(-1, 2),
    )  # fmt: skip


def survey(recipe: Recipe, micro_batches: int, stages: int = 1, index: int = 0, pictures: bool = True) -> Survey:
    """Traces stage `index` of `stages` with one layer and with two; the vision tower likewise, on a full chunk of pictures.

    micro_batches: those of a step, of which pictures are encoded together.
    """

    def fresh(count: int) -> list[Batch]:
        return [planned_batch(recipe, pictures) for _ in range(count)]

    batch, p = fresh(1)[0], recipe.parallel
    block = p.tensor * p.context * stages
    share = max(len(batch.patches) // block, 1)
    whole = p.tensor * p.context * p.pipeline  # in a longer pipeline each rank encodes less than in the traced one
    count = min(-(-recipe.training.vision_chunk_patches // share), max(micro_batches * block // whole, 1))
    with traced(small(recipe, stages, 1, 1), index) as step:
        one = _costs(step.language(fresh(1)))
        first_held = step.held
        two = _costs(step.language(fresh(2)))
        held = step.held
        seen, again = (_costs(step.vision(fresh(n)) if pictures else {}) for n in (count, 2 * count))
    with traced(small(recipe, stages, 2, 2), index) as step:
        deep = _costs(step.language(fresh(1)))
        deep_held = step.held
        deep_seen = _costs(step.vision(fresh(count)) if pictures else {})
    return Survey(
        language=one["language"],
        layer=deep["language"].minus(one["language"]),
        micro_batch=summed(two["language"].minus(one["language"]).memory, held, -1 if index < stages - 1 else 0),
        held=sum(held.values()),
        held_layer=sum(deep_held.values()) - sum(first_held.values()),
        encode=Cost(deep_seen["encode"].memory, seen["encode"].work, seen["encode"].sent),
        vision_backward=seen["vision backward"],
        encode_layer=deep_seen["encode"].minus(seen["encode"]),
        vision_backward_layer=deep_seen["vision backward"].minus(seen["vision backward"]),
        encode_batch=summed(Counter(), again["encode"].minus(seen["encode"]).memory, 1 / count),
        vision_backward_batch=summed(
            Counter(), again["vision backward"].minus(seen["vision backward"]).memory, 1 / count
        ),
        reduce=one["reduce"],
        reduce_layer=deep["reduce"].minus(one["reduce"]),
        vision_batches=count,
        pixels=batch.patches.numel(),
        block=block,
    )


def _costs(phases: Phases) -> dict[str, Cost]:
    return {name: cost_of(phases.get(name)) for name in ("encode", "language", "vision backward", "reduce")}
