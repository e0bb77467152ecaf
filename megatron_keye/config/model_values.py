"""Shapes of the model section that contradict one another."""

from __future__ import annotations

from megatron_keye.config.divisibility import divisors, nearest_of
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.rope import LAYOUTS, indexer_sections, mrope_sections
from megatron_keye.errors import UserError


def model_errors(cfg: ModelConfig) -> list[str]:
    """One line per fault, with the nearest valid choice."""
    if cfg.vision_layers == 0 and cfg.indexer_heads == 0:
        return _language_errors(cfg) + _plain_errors(cfg)
    return _language_errors(cfg) + _vision_errors(cfg) + _token_errors(cfg)


def _plain_errors(cfg: ModelConfig) -> list[str]:
    if cfg.attention_mode == "dense":
        return []
    return [f"model.attention_mode = {cfg.attention_mode!r} needs indexers, and the model has none; choose 'dense'"]


def _language_errors(cfg: ModelConfig) -> list[str]:
    errors = []
    heads, groups = cfg.num_attention_heads, cfg.num_query_groups
    if min(heads, groups) >= 1 and heads % groups:
        near = nearest_of(groups, divisors(heads))
        errors.append(
            f"model.num_query_groups = {groups} does not divide num_attention_heads = {heads}; the nearest is {near}"
        )
    if cfg.experts_per_token > cfg.num_experts:
        errors.append(
            f"model.experts_per_token = {cfg.experts_per_token} is above num_experts; the nearest is {cfg.num_experts}"
        )
    for key in ("head_dim", "indexer_head_dim"):
        if getattr(cfg, key) % 2:
            errors.append(f"model.{key} = {getattr(cfg, key)} must be even; the nearest is {getattr(cfg, key) + 1}")
    if cfg.indexer_fake_fp8 and cfg.indexer_head_dim & (cfg.indexer_head_dim - 1):
        near = nearest_of(cfg.indexer_head_dim, [2**n for n in range(1, 12)])
        errors.append(
            f"model.indexer_head_dim = {cfg.indexer_head_dim} must be a power of two for indexer_fake_fp8; the nearest is {near}"
        )
    if not errors and cfg.mrope_layout in LAYOUTS:  # a wrong layout is named among the choices
        try:
            (indexer_sections if cfg.indexer_heads else mrope_sections)(cfg)
        except UserError as error:
            errors.append(str(error))
    return errors


def _vision_errors(cfg: ModelConfig) -> list[str]:
    if 0 in (cfg.vision_layers, cfg.indexer_heads):
        return ["model.vision_layers and model.indexer_heads: 0 in one needs 0 in the other (plain Qwen3-MoE)"]
    width, heads = cfg.vision_hidden_size, cfg.vision_heads
    if heads >= 1 and width % (4 * heads):  # each head's dims are halves of two axes
        good = [n for n in divisors(width) if width % (4 * n) == 0]
        near = f"; the nearest is {nearest_of(heads, good)}" if good else ", which no number of heads can"
        return [
            f"model.vision_heads = {heads} must split vision_hidden_size = {width} into heads of a multiple of 4{near}"
        ]
    return []


def _token_errors(cfg: ModelConfig) -> list[str]:
    errors = []
    for key in ("image_token_id", "video_token_id"):
        if getattr(cfg, key) >= cfg.vocab_size:
            errors.append(
                f"model.{key} = {getattr(cfg, key)} is outside the vocabulary; the nearest is {cfg.vocab_size - 1}"
            )
    if cfg.image_token_id == cfg.video_token_id:
        errors.append(f"model.image_token_id and model.video_token_id are both {cfg.image_token_id}; they must differ")
    return errors
