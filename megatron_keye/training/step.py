"""One training step: encode pictures, run the language model through Megatron's schedule, send gradients back, update.

Every loss is a sum over tokens, divided once by a count over the whole step, so that micro-batches, data and context
parallelism change nothing but rounding. With N real tokens and M tokens to predict in the step, gradients are those of
    sum(language-model losses) / M  +  indexer weight * sum over layers of sum(KL) / N  +  coefficient * balance.
`balance` is transformers' load balancing loss of one layer and row, averaged over layers and, by their tokens, over rows.
Megatron divides everything by N at the end, so the first term goes in times N / M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe import moe_utils

from keye_data.sample import IGNORE, Batch
from megatron_keye.model.attention import SparseCoreAttention
from megatron_keye.parallel.context import zigzag
from megatron_keye.parallel.plan import Plan
from megatron_keye.parallel.vision import VisionStep


@dataclass
class StepResult:
    lm_loss: float
    grad_norm: float | None  # None: the step was skipped
    finite: bool
    tokens: int  # real ones, of the whole step
    predicted_tokens: int
    extra: dict[str, float] = field(default_factory=dict)


class TrainStep:
    def __init__(
        self,
        language: list[DistributedDataParallel],
        vision_ddp: DistributedDataParallel | None,
        vision: VisionStep,
        optimizer: ChainedOptimizer,
        plan: Plan,
    ):
        self.language, self.vision_ddp, self.vision = language, vision_ddp, vision
        self.optimizer, self.plan = optimizer, plan
        self.config = language[0].module.config
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = optimizer.scale_loss if optimizer.chained_optimizers else None
        self.schedule = get_forward_backward_func()
        # Megatron keeps these by layer, with room for the layers of the first model of the process.
        moe_utils.get_moe_layer_wise_logging_tracker().clear()

    def __call__(self, batches: list[Batch]) -> StepResult:
        for model in [*self.language, self.vision_ddp]:
            if model is not None:
                model.zero_grad_buffer()
        self.optimizer.zero_grad()
        tokens, predicted = self._count(batches)
        visual = self.vision.encode(batches)
        losses = self._language(batches, visual, lm_scale=tokens / max(predicted, 1))
        self.vision.backward()
        if self.vision_ddp is not None:
            self.vision_ddp.finish_grad_sync()
            self.vision_ddp.scale_gradients(1.0 / tokens)
        lm_loss = self._sum_over_step(losses) / max(predicted, 1)
        extra = self._other_losses(sum(len(b.input_ids) for b in batches), tokens)
        finite, grad_norm = self._update(lm_loss)
        return StepResult(lm_loss, grad_norm, finite, tokens, predicted, extra)

    def _language(self, batches: list[Batch], visual: list[torch.Tensor], lm_scale: float) -> torch.Tensor:
        """Forward and backward of every micro-batch -> sum of this rank's token losses."""
        rows, length = batches[0].input_ids.shape
        iterators = [iter(list(zip(batches, visual))) for _ in self.language]
        reports = self.schedule(
            forward_step_func=partial(self._forward_step, lm_scale=lm_scale),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.language if len(self.language) > 1 else self.language[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            decoder_seq_length=length,
            forward_only=False,
        )
        total = torch.zeros((), dtype=torch.float64, device=batches[0].input_ids.device)
        return total + sum(report["lm loss"] for report in reports)

    def _forward_step(self, data: Iterator, model: DistributedDataParallel, lm_scale: float):
        batch, visual = next(data)
        rank, size = ps.get_context_parallel_rank(), self.plan.config.context
        ids, targets, positions, start, stop = (
            zigzag(t, rank, size, dim=t.dim() - 1)
            for t in (batch.input_ids, batch.targets, batch.position_ids, batch.key_start, batch.key_stop)
        )
        losses = model(ids, positions, torch.stack([start, stop]), visual, targets)
        tokens = (start != stop).sum().to(torch.int32)

        def loss_func(losses: torch.Tensor):
            total = losses.sum()
            return total * lm_scale, tokens, {"lm loss": total.detach().double()}

        return losses, loss_func

    def _count(self, batches: list[Batch]) -> tuple[int, int]:
        """Real tokens, and tokens to predict, in the whole step."""
        real = sum(int((b.key_start != b.key_stop).sum()) for b in batches)
        predicted = sum(int((b.targets != IGNORE).sum()) for b in batches)
        counts = torch.tensor([real, predicted], device=torch.cuda.current_device())
        dist.all_reduce(counts, group=ps.get_data_parallel_group())
        return int(counts[0]), int(counts[1])

    def _sum_over_step(self, value: torch.Tensor) -> float:
        """Losses stand on the last stage, each context shard its own."""
        dist.all_reduce(value, group=ps.get_data_parallel_group(with_context_parallel=True))
        last = ps.get_pipeline_model_parallel_last_rank()
        dist.broadcast(value, src=last, group=ps.get_pipeline_model_parallel_group())
        return float(value)

    def _other_losses(self, rows: int, tokens: int) -> dict[str, float]:
        """Means over layers: the indexers' KL a token, and the router's balance loss a row (`rows` of this block).

        The balance loss is logged as Megatron has it: 1 when all experts are used alike, whatever their number and top-k.
        """
        extra = {}
        layers = self.config.num_layers
        if self.config.indexer_loss_weight:
            kl = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
            for model in self.language:
                for module in model.modules():
                    if isinstance(module, SparseCoreAttention) and module.kl_sum is not None:
                        kl += module.kl_sum.double()
                        module.kl_sum = None
            dist.all_reduce(kl, group=ps.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(kl, group=ps.get_pipeline_model_parallel_group())
            extra["indexer loss"] = float(kl) / (tokens * layers)
        if self.config.moe_aux_loss_coeff:
            moe_utils.reduce_aux_losses_tracker_across_ranks()
            tracker = moe_utils.get_moe_layer_wise_logging_tracker()
            values = [float(entry["values"].sum()) for entry in tracker.values()]
            extra["load_balancing_loss"] = sum(values) / (layers * rows)
            moe_utils.clear_aux_losses_tracker()
        return extra

    def _update(self, lm_loss: float) -> tuple[bool, float | None]:
        """-> (was everything finite, gradient norm). A non-finite loss or gradient leaves weights and moments alone."""
        found_bad = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        bad = torch.tensor(
            float(found_bad or not math.isfinite(lm_loss) or not math.isfinite(norm)),
            device=torch.cuda.current_device(),
        )
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            return False, None
        for optimizer in self.optimizer.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm)
        self.optimizer.step_with_ready_grads()
        return True, norm
