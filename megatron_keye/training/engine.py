"""Model, optimizer and step of one rank, built from a recipe: everything of a run but its data and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module

from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.model.init import initialize_weights
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import LanguageModel
from megatron_keye.model.transformer_config import language_config, vision_config
from megatron_keye.parallel.plan import Plan
from megatron_keye.parallel.vision import VisionStep
from megatron_keye.training import checkpoint, optimizer
from megatron_keye.training.health import check_gate
from megatron_keye.training.machine import check_machine
from megatron_keye.training.scope import apply_scope
from megatron_keye.training.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """`resume_from`: an iteration folder whose weights and optimizer will be restored, so that none need be drawn."""

    def __init__(self, recipe: Recipe, plan: Plan, resume_from: Path | None = None):
        self.recipe, self.plan = recipe, plan
        self.dtype = DTYPES[recipe.training.precision]
        self._build_model()
        if resume_from is None:
            self._first_weights()
        self._build_optimizer()

    def _build_model(self) -> None:
        recipe, cfg = self.recipe, self.recipe.model
        device = torch.device(torch.cuda.current_device())
        check_machine(recipe, device)
        indexer_learns = cfg.attention_mode != "dense" and recipe.training.scope in ("all", "indexers")
        config = language_config(
            cfg,
            recipe.parallel,
            dtype=self.dtype,
            indexer_loss_weight=recipe.training.indexer_loss_weight if indexer_learns else 0.0,
            router_aux_loss_coeff=cfg.router_aux_loss_coeff if recipe.training.scope != "indexers" else 0.0,
            recompute=recipe.training.recompute,
        )
        stages = range(recipe.parallel.virtual_pipeline) if recipe.parallel.virtual_pipeline else [None]
        self.language = [LanguageModel(config, vp_stage=stage).to(device).train() for stage in stages]
        self.tower = VisionTower(vision_config(cfg, dtype=self.dtype), self.plan.vision).to(device).train()
        self.trained = apply_scope(self.language, self.tower, recipe.training.scope)

    def _first_weights(self) -> None:
        source = self.recipe.training.init_from
        if source is None:
            initialize_weights([*self.language, self.tower], self.recipe.model, self.recipe.training.seed)
            return
        folder = Path(source)
        if (folder / "config.json").is_file():
            if self.recipe.training.recall_gate is not None:
                raise UserError(
                    f"training.recall_gate: the folder {source} tells no recall; set null, or begin from the warm-up's checkpoints"
                )
            from megatron_keye.model.hf import load_hf

            load_hf(folder, self.recipe.model, self.language, self.tower)
            return
        found = folder if (folder / "checksums.json").is_file() else agreed(checkpoint.newest(folder))
        if found is None:
            raise UserError(
                f"training.init_from: {source} is neither a Hugging Face folder (config.json) nor a folder of "
                "checkpoints (iter_*); train the phase before it first, or import a model with tools/convert.py"
            )
        if self.recipe.training.recall_gate is not None:
            check_gate(found, self.recipe.training.recall_gate)
        checkpoint.load_weights(found, self.recipe.model, self.language, self.tower, self.plan)

    def _build_optimizer(self) -> None:
        modules: list[Any] = list(self.language)
        if self.dtype is torch.bfloat16:
            modules = [Float16Module(m.config, m) for m in modules]
        self.language_ddp = optimizer.wrap(modules)
        trains_tower = optimizer.trains([self.tower])
        self.tower_ddp = optimizer.wrap([self.tower], self.plan.vision)[0] if trains_tower else None
        self.optimizer = optimizer.build_optimizer(
            self.recipe.optimizer, self.language_ddp, self.tower_ddp, self.plan, self.dtype
        )
        self.schedule = optimizer.build_schedule(self.recipe.optimizer, self.recipe.training, self.optimizer)
        training = self.recipe.training
        vision = VisionStep(self.tower, self.plan, training.vision_chunk_patches, training.balance)
        self.step = TrainStep(self.language_ddp, self.tower_ddp, vision, self.optimizer, self.plan)


def agreed(path: Path | None) -> Path | None:
    """Rank 0's view of the file system, for all."""
    box = [path]
    dist.broadcast_object_list(box, src=0)
    return box[0]
