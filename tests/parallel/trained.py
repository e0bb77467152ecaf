"""A checkpoint of a mini model after a step in some layout, for tests that read it elsewhere.

launch(train_and_save, 2, root, {"tensor": 2, "expert_tensor": 2}, "bf16")
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_keye.config.load import recipe_yaml
from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.model.names import released_tensors
from megatron_keye.parallel import plan
from megatron_keye.training.checkpoint import Checkpointer, Progress
from megatron_keye.training.engine import Engine
from tests.parallel.rows import step_batches


def mini_config(**overrides: object) -> ModelConfig:
    return build_config("keye_mini", **{"vocab_size": 512, "image_token_id": 510, "video_token_id": 511, **overrides})


def recipe_for(layout: dict, precision: str, init_from: Path | None = None, scope: str = "all") -> Recipe:
    recipe = Recipe(model=mini_config(num_layers=2, topk=8, attention_mode="sparse"), parallel=ParallelConfig(**layout))
    recipe.training.precision, recipe.training.scope = precision, scope
    recipe.training.init_from = None if init_from is None else str(init_from)
    recipe.optimizer.lr, recipe.optimizer.warmup_steps = 1e-3, 0
    recipe.data.tokenizer = "no-tokenizer-was-here"
    return recipe


def train_and_save(root: Path, layout: dict, precision: str, scope: str = "all", give_engine: bool = False):
    """One step, then a checkpoint in `root` -> the gradient norm, as a sign that something moved; or the engine."""
    recipe = recipe_for(layout, precision, scope=scope)
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    result = engine.step(step_batches(recipe.model, groups, 0, rows=4, micro_batch=1))
    Checkpointer(root, groups, recipe.model, keep=2).save(Progress(1, 4), engine, {}, recipe_yaml(recipe))
    return engine if give_engine else result.grad_norm


def load(layout: dict, precision: str, source: Path) -> dict[str, torch.Tensor]:
    """What training.init_from = `source` gives this rank: parameter name -> its local part."""
    recipe = recipe_for(layout, precision, init_from=source)
    engine = Engine(recipe, plan.initialize(recipe.parallel))
    parts = [("language_model.", *engine.language), ("visual.", engine.tower)]
    return {prefix + name: p.detach() for prefix, module in parts for name, p in module.named_parameters()}


def whole_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Released tensors of an engine that is alone."""
    return {n: t for part in (*engine.language, engine.tower) for n, t in released_tensors(part, engine.recipe.model)}
