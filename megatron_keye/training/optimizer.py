"""AdamW by Megatron's distributed optimizer, over the language model and the vision tower together.

Each has its own groups to sum gradients over (parallel/plan.py); one global norm clips both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import nn

from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.config.training import TrainingConfig
from megatron_keye.parallel.plan import Plan


def wrap(modules: list[nn.Module], groups: Any = None) -> list[DistributedDataParallel]:
    """Megatron's DDP: gradients summed in fp32, for the distributed optimizer."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return [
        DistributedDataParallel(module.config, config, module, disable_bucketing=i > 0, pg_collection=groups)
        for i, module in enumerate(modules)
    ]


def build_optimizer(
    cfg: OptimizerConfig,
    language: list[DistributedDataParallel],
    vision: DistributedDataParallel | None,
    plan: Plan,
    dtype: torch.dtype,
) -> ChainedOptimizer:
    """Over every trained parameter of the two; a module with none is left out, on all ranks alike."""
    _all_ranks_make_the_same(trains(language), vision is not None and trains([vision]))
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.beta1,
        adam_beta2=cfg.beta2,
        adam_eps=cfg.eps,
        clip_grad=cfg.clip_grad,
        use_distributed_optimizer=True,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        optimizer_cpu_offload=cfg.offload_fraction > 0,
        optimizer_offload_fraction=cfg.offload_fraction,
    )
    overrides = get_standard_config_overrides(config)
    # Queries and keys are normalised, so of this matrix only the gate rows have a scale, and decay would shrink the scores.
    overrides[ParamKey(name="*indexer.q_proj.weight")] = ParamGroupOverride(wd_mult=0.0)
    optimizers: list[Any] = []
    if trains(language):
        made = get_megatron_optimizer(config, language, config_overrides=overrides, use_gloo_process_groups=False)
        optimizers += made.chained_optimizers
    if vision is not None and trains([vision]):
        made = get_megatron_optimizer(
            config, [vision], config_overrides=overrides, use_gloo_process_groups=False, pg_collection=plan.vision
        )
        for group in made.param_groups:
            group["max_lr"], group["min_lr"] = cfg.lr * cfg.vision_lr_scale, cfg.min_lr * cfg.vision_lr_scale
        optimizers += made.chained_optimizers
    return ChainedOptimizer(optimizers)


def _all_ranks_make_the_same(*optimizers: bool) -> None:
    """Making one is a collective of the whole world in Megatron: a rank that left one out would be waited for for ever."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, optimizers)
    if len(set(everyone)) > 1:
        raise RuntimeError(f"what trains (language model, vision tower) differs between ranks: {everyone}")


def trains(modules: list[Any]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def build_schedule(
    cfg: OptimizerConfig, training: TrainingConfig, optimizer: ChainedOptimizer
) -> OptimizerParamScheduler:
    """Learning rate by step: linear warm-up, then cosine, WSD or constant."""
    style = {"cosine": "cosine", "wsd": "WSD", "constant": "constant"}[cfg.schedule]
    wsd_steps = cfg.decay_steps or max(1, training.steps // 10)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.warmup_steps,
        lr_decay_steps=(cfg.decay_steps if cfg.schedule == "cosine" else None) or training.steps,
        lr_decay_style=style,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_steps if cfg.schedule == "wsd" else None,
        lr_wsd_decay_style="cosine" if cfg.schedule == "wsd" else None,
    )
