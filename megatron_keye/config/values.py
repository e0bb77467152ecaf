"""Values that are wrong on any machine: choices, ranges, and settings that contradict one another."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import MISSING

from keye_data.blend import shares
from keye_data.errors import DataError
from megatron_keye.config.model import ATTENTION_MODES
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.rope import LAYOUTS
from megatron_keye.config.schema import dotted_keys, nearest
from megatron_keye.config.training import SCOPES

CHOICES: dict[str, tuple[str, ...]] = {
    "model.mrope_layout": tuple(LAYOUTS),
    "model.attention_mode": ATTENTION_MODES,
    "model.attention_backend": ("reference", "torch", "triton"),
    "data.train_on": ("answers", "all"),
    "data.too_long": ("skip", "cut"),
    "data.video.backend": ("pyav", "dali", "torchcodec"),
    "data.video.device": ("auto", "cpu", "gpu"),
    "training.precision": ("bf16", "fp32"),
    "training.scope": SCOPES,
    "training.recompute": ("none", "selective", "moe", "full"),
    "parallel.dispatcher": ("alltoall", "allgather", "flex"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "logging.wandb": ("offline", "online", "off"),
}

# Every number is at least 1, save these, which may be 0 or any fraction above it ...
AT_LEAST_ZERO = (
    "model.router_aux_loss_coeff",
    "data.shuffle_buffer",
    "data.workers",
    "training.seed",
    "training.indexer_loss_weight",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.clip_grad",
    "optimizer.vision_lr_scale",
    "optimizer.offload_fraction",
    "model.indexer_heads",
    "model.vision_layers",
    "model.image_token_id",
    "model.video_token_id",
)
# ... and these, which must be above 0
ABOVE_ZERO = (
    "model.rms_norm_eps",
    "model.init_std",
    "model.vision_layer_norm_eps",
    "model.projector_norm_eps",
    "data.long_short_ratio",
    "data.video.fps",
    "training.collective_timeout_minutes",
    "training.recall_gate",
    "optimizer.eps",
)


def value_errors(recipe: Recipe) -> list[str]:
    """One line per value outside its choices or range."""
    errors = []
    for key in dotted_keys(Recipe):
        value = get(recipe, key)
        if key in CHOICES and value is not None and value not in CHOICES[key]:
            choices = ", ".join(CHOICES[key])
            errors.append(f"{key} = {value!r} is none of {choices}; the nearest is {nearest(value, CHOICES[key])!r}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            low, ok = _lowest(key, value)
            if not ok:
                errors.append(f"{key} = {value} must be {low}")
    return errors + _data_errors(recipe) + _schedule_errors(recipe)


def get(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _lowest(key: str, value: float) -> tuple[str, bool]:
    if not math.isfinite(value):
        return "a finite number", False
    if key in AT_LEAST_ZERO:
        return "0 or more", value >= 0
    if key in ABOVE_ZERO:
        return "above 0", value > 0
    return "1 or more", value >= 1


def _data_errors(recipe: Recipe) -> list[str]:
    data, image, video = recipe.data, recipe.data.image, recipe.data.video
    errors = []
    if data.tokenizer == MISSING:
        errors.append("data.tokenizer is not set; give a Hugging Face folder or a qwen.tiktoken file")
    if not data.sources:
        errors.append("data.sources is empty; give at least one folder made by tools/build_shards.py")
    weights = [source.weight for source in data.sources]
    for i, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            errors.append(f"data.sources.{i}.weight = {weight} must be above 0; leave the source out to ignore it")
    if weights and all(math.isfinite(weight) and weight > 0 for weight in weights):
        try:
            shares(data.sources, data.long_short_ratio)
        except DataError as error:
            errors.append(str(error))
    for low, high, low_key, high_key in (
        (image.min_tokens, image.max_tokens, "data.image.min_tokens", "data.image.max_tokens"),
        (video.min_frame_tokens, video.max_frame_tokens, "data.video.min_frame_tokens", "data.video.max_frame_tokens"),
        (
            2 * video.min_frame_tokens,
            video.total_tokens,
            "twice data.video.min_frame_tokens",
            "data.video.total_tokens",
        ),
    ):
        if low > high:
            errors.append(f"{low_key} = {low} is more than {high_key} = {high}; set {high_key} to {low} or more")
    try:
        video.timestamp_format.format(seconds=1.0)
    except (KeyError, IndexError, ValueError) as error:
        errors.append(
            f"data.video.timestamp_format = {video.timestamp_format!r} cannot be filled in with {{seconds}}: {error}"
        )
    if data.seq_length > recipe.model.max_position_embeddings:
        most = recipe.model.max_position_embeddings
        errors.append(
            f"data.seq_length = {data.seq_length} is above model.max_position_embeddings; the nearest is {most}"
        )
    return errors


def _schedule_errors(recipe: Recipe) -> list[str]:
    opt, steps = recipe.optimizer, recipe.training.steps
    errors = []
    if opt.warmup_steps >= steps:
        errors.append(
            f"optimizer.warmup_steps = {opt.warmup_steps} must be below training.steps = {steps}; the nearest is {steps - 1}"
        )
    elif opt.schedule == "wsd" and opt.warmup_steps + (opt.decay_steps or 0) > steps:
        left = steps - opt.warmup_steps
        errors.append(
            f"optimizer.decay_steps = {opt.decay_steps} does not fit behind the warm-up; the nearest is {left}"
        )
    if opt.min_lr > opt.lr >= 0:
        errors.append(f"optimizer.min_lr = {opt.min_lr} is above optimizer.lr = {opt.lr}; the nearest is {opt.lr}")
    if opt.offload_fraction > 1:
        errors.append(f"optimizer.offload_fraction = {opt.offload_fraction} must be 0 to 1; the nearest is 1")
    elif opt.offload_fraction and recipe.training.precision == "fp32":
        errors.append("optimizer.offload_fraction moves the fp32 masters of precision 'bf16'; for 'fp32' set it to 0")
    for key, beta in (("beta1", opt.beta1), ("beta2", opt.beta2)):
        if beta >= 1:
            errors.append(f"optimizer.{key} = {beta} must be below 1")
    return errors


def mode_errors(recipe: Recipe) -> list[str]:
    """What attention does against what learns: indexers learn from the KL, which dense attention does not compute."""
    mode, scope = recipe.model.attention_mode, recipe.training.scope
    if mode not in ATTENTION_MODES or scope not in SCOPES:
        return []  # already an error of its own
    if recipe.model.vision_layers == 0:
        return ["model.vision_layers = 0: a model without vision tower can be converted and run, but not trained"]
    if (gate := recipe.training.recall_gate) is not None:
        if mode != "sparse":
            return [
                f"training.recall_gate = {gate} asks what indexers have learnt, and attention_mode = {mode!r} does not rely on them; set null"
            ]
        if gate > 1:
            return [f"training.recall_gate = {gate} is a share and must be at most 1; the nearest is 1"]
    if mode == "warmup" and scope != "indexers":
        return [
            f"model.attention_mode = 'warmup' trains the indexers alone, not training.scope = {scope!r}; the nearest is 'indexers'"
        ]
    if mode == "dense" and scope == "indexers":
        return [
            "training.scope = 'indexers' learns nothing in dense attention; the nearest model.attention_mode is 'warmup'"
        ]
    if mode == "dense" and scope == "all":
        return [
            "training.scope = 'all' has indexers without gradient in dense attention; the nearest is 'all_but_indexers'"
        ]
    if scope in ("all", "indexers") and recipe.training.indexer_loss_weight == 0:
        return [
            f"training.indexer_loss_weight = 0 leaves the indexers of scope {scope!r} without gradient; set it above 0"
        ]
    return []


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed but probably not meant."""
    model, data, found = recipe.model, recipe.data, []
    if model.attention_mode == "sparse" and model.topk >= data.seq_length:
        found.append(
            f"model.topk = {model.topk} is not below data.seq_length = {data.seq_length}: nothing sparse will happen"
        )
    for key in ("data.image.max_tokens", "data.video.total_tokens"):
        if get(recipe, key) > data.seq_length:
            found.append(
                f"{key} = {get(recipe, key)} is above data.seq_length = {data.seq_length}: the largest samples will not fit in a row"
            )
    if recipe.training.stop_after is not None and recipe.training.stop_after > recipe.training.steps:
        found.append(f"training.stop_after = {recipe.training.stop_after} is above training.steps and has no effect")
    return found
