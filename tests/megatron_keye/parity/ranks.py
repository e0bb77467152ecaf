"""Our language model on one or several ranks: logits, loss and every gradient of a training step, by released name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from keye_data.sample import Batch, EncodedSample
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.model.names import global_name, language_link, load_released
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine
from tests.parallel.rows import random_sample, to_batch

SEQ_LENGTH = 48


@dataclass
class Result:
    """What one rank has. `gradients`: our parameter's global name -> its local part."""

    loss: float
    balance: float | None
    logits: list[Tensor]  # [b, S, V] of each micro-batch; none off the last stage, nor of context shards
    gradients: dict[str, Tensor]
    tensor_rank: int
    data_rank: int


def packed_rows(cfg: ModelConfig, count: int = 4) -> list[list[EncodedSample]]:
    """Rows of two or three documents of text, and padding at the end."""
    rng = np.random.default_rng(3)
    lengths = [(11, 20, 9), (30, 13), (17, 17, 6), (8, 35)]
    return [[random_sample(cfg, n, 0, rng)[0] for n in lengths[i % len(lengths)]] for i in range(count)]


def step(layout: dict, cfg: ModelConfig, weights: dict[str, Tensor], rows: list, coefficient: float) -> Result:
    """One step of the trainer's own engine, without clipping, on this rank's share of the rows, two at a time."""
    recipe = Recipe(model=cfg, parallel=ParallelConfig(**layout))
    recipe.model.router_aux_loss_coeff = coefficient
    recipe.training.precision = "fp32"
    recipe.optimizer.clip_grad = 0.0
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    for stage in engine.language:
        load_released(stage, cfg, weights.__getitem__)
    mine = rows[
        groups.data_rank * len(rows) // groups.data_size : (groups.data_rank + 1) * len(rows) // groups.data_size
    ]
    none = np.zeros((0, 3, 14, 14))
    batches = [to_batch([(row, [], none) for row in mine[i : i + 2]], SEQ_LENGTH) for i in range(0, len(mine), 2)]
    logits = [] if recipe.parallel.context > 1 else forward(engine, batches)
    result = engine.step(batches)
    return Result(
        result.lm_loss,
        result.extra.get("load_balancing_loss"),
        logits,
        gradients(engine),
        groups.tensor_rank,
        groups.data_rank,
    )


@torch.no_grad()
def forward(engine: Engine, batches: list[Batch]) -> list[Tensor]:
    def forward_step(data, model):
        batch = next(data)
        ranges = torch.stack([batch.key_start, batch.key_stop])
        return model(batch.input_ids, batch.position_ids, ranges), lambda logits, non_loss_data: logits

    rows, length = batches[0].input_ids.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=engine.language_ddp[0],
        num_microbatches=len(batches), seq_length=length, micro_batch_size=rows, decoder_seq_length=length,
        forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip


def gradients(engine: Engine) -> dict[str, Tensor]:
    """The distributed optimizer leaves each data rank its slice of the summed gradients: here they are put together."""
    (ddp,) = engine.language_ddp
    for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            slices = bucket.grad_data.chunk(group.size())
            dist.all_gather_into_tensor(bucket.grad_data, slices[group.rank()].clone(), group=group)
    module, cfg = engine.language[0], engine.recipe.model
    return {
        global_name(name, module, cfg): parameter.main_grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def join_gradients(results: list[Result], cfg: ModelConfig) -> dict[str, Tensor]:
    """The ranks' parts -> whole gradients by released name. Copies of one part must be equal to the last bit."""
    shards: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, gradient in result.gradients.items():
            held = shards.setdefault(name, {}).setdefault(result.tensor_rank, gradient)
            assert torch.equal(held, gradient), f"{name} differs between ranks that hold the same part"
    whole: dict[str, Tensor] = {}
    for name, parts in shards.items():
        link = language_link(name, cfg)
        joined = join([parts[rank] for rank in sorted(parts)], link.shard)
        whole |= zip(link.released, link.split(joined))
    return whole


def join(parts: list[Tensor], shard: str) -> Tensor:
    if shard == "none":
        assert all(torch.equal(part, parts[0]) for part in parts), "tensor ranks disagree on a replicated gradient"
    if shard == "none" or len(parts) == 1:
        return parts[0]
    if shard == "gated":
        return torch.cat([half for i in (0, 1) for half in (part.chunk(2)[i] for part in parts)])
    return torch.cat(parts, dim=1 if shard == "columns" else 0)


def join_logits(results: list[Result]) -> Tensor:
    """[rows, S, V]"""
    by_data_rank = {result.data_rank: torch.cat(result.logits) for result in results if result.logits}
    return torch.cat([by_data_rank[rank] for rank in sorted(by_data_rank)])
