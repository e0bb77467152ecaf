"""The model section against config.json: Keye's own (`KeyeVL2`), and plain Qwen3-MoE's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_keye.config import schema
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.model_values import model_errors
from megatron_keye.config.rope import mrope_sections
from megatron_keye.errors import UserError
from megatron_keye.hf_release.shipping import AUTO_MODEL

KEYE, QWEN = "KeyeVL2", "qwen3_moe"

# Our key -> theirs. Keys with a default of ours may be missing from a folder.
LANGUAGE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "router_aux_loss_coeff": "router_aux_loss_coef",
}
INDEXER = {"indexer_heads": "indexer_num_heads", "indexer_head_dim": "indexer_head_dim", "topk": "topk"}
VISION = {
    "vision_layers": "num_hidden_layers",
    "vision_hidden_size": "hidden_size",
    "vision_heads": "num_attention_heads",
    "vision_ffn_hidden_size": "intermediate_size",
    "vision_layer_norm_eps": "layer_norm_eps",
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "vision_rope_theta": "rope_theta",
    "vision_packing_positions": "packing_positions",
    "projector_norm_eps": "projector_norm_eps",
}
TOKENS = {"image_token_id": "image_token_id", "video_token_id": "video_token_id"}
OPTIONAL = {
    "init_std",
    "router_aux_loss_coeff",
    "merge_size",
    "vision_rope_theta",
    "vision_packing_positions",
    "projector_norm_eps",
    "image_token_id",
    "video_token_id",
}
# What the stack computes; a folder that says otherwise is another model. (value, what a missing key means)
FIXED: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "tie_word_embeddings": (False, False),
    "decoder_sparse_step": (1, 1),
    "mlp_only_layers": ([], []),
    "use_sliding_window": (False, False),
}
# Qwen's tokens for text and pictures, as far as the vocabulary reaches.
BOS, EOS = 151_643, 151_645
VISION_MARKS = {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653}


def read_config(folder: str | Path, **overrides: object) -> ModelConfig:
    """config.json of `folder` as a model section, `overrides` on top. attention_mode: sparse for Keye, dense for Qwen3-MoE.

    Raises UserError naming the file and the key: unknown architecture, missing or impossible value.
    """
    path = Path(folder) / "config.json"
    raw = _load(path)
    kind = raw.get("model_type")
    if kind not in (KEYE, QWEN):
        raise UserError(f"{path}: model_type {kind!r} is neither {KEYE} nor {QWEN}")
    raw = {**raw, "num_experts": raw.get("num_experts", raw.get("num_local_experts"))}  # transformers 5 renamed it
    _check_fixed(raw, path, norm_topk_default=kind == KEYE)
    values = _read(raw, LANGUAGE, path, "") | _read_rope(raw, path, kind)
    if kind == KEYE:
        values |= _read(_section(raw, "sa_config", path), INDEXER, path, "sa_config.")
        values |= _read(vision := _section(raw, "vision_config", path), VISION, path, "vision_config.")
        values |= _read(raw, TOKENS, path, "") | {"attention_mode": "sparse"}
        if "image_size" in vision:
            if not isinstance(size := vision["image_size"], int) or isinstance(size, bool):
                raise UserError(f"{path}: vision_config.image_size = {size!r} is no whole number")
            values["vision_position_grid"] = size // values["patch_size"]
    else:
        values |= {"attention_mode": "dense", "vision_layers": 0, "indexer_heads": 0}
    typed = schema.typed(ModelConfig, {**values, **overrides}, str(path))
    cfg = _with_default_sections(schema.instance(ModelConfig, typed, str(path)))
    for key, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"{path}: {key} = {value} must not be negative")
    if errors := model_errors(cfg):
        raise UserError("\n".join(f"{path}: {error}" for error in errors))
    return cfg


def write_config(cfg: ModelConfig, folder: Path, dtype: str) -> None:
    """config.json and generation_config.json; `dtype` as torch names it, without "torch."."""
    files = {"config.json": config_dict(cfg, dtype), "generation_config.json": _tokens(cfg) | {"do_sample": False}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_dict(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    plain = cfg.vision_layers == 0
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if plain else "KeyeVL2MoeForConditionalGeneration"],
        "model_type": QWEN if plain else KEYE,
        "torch_dtype": dtype,
        **_write(cfg, LANGUAGE),
        **{key: value for key, (value, _) in FIXED.items()},
        "norm_topk_prob": True,
        "intermediate_size": 3 * cfg.hidden_size,  # of a dense layer; there is none
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "use_cache": True,
        **_tokens(cfg),
    }
    if plain:
        return config
    config["rope_scaling"] = {
        "type": "default",
        "rope_type": "default",
        "mrope_section": mrope_sections(cfg),
        "mrope_interleaved": cfg.mrope_layout == "interleaved",
    }
    config["sa_config"] = {
        **_write(cfg, INDEXER),
        "indexer_num_kv_heads": 1,
        "q_chunk_size": 512,
        "kv_chunk_size": 512,
    }
    config["vision_config"] = {
        **_write(cfg, VISION),
        "num_channels": 3,
        "image_size": cfg.vision_position_grid * cfg.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }
    config["auto_map"] = AUTO_MODEL
    marks = {key: value for key, value in VISION_MARKS.items() if value < cfg.vocab_size}
    return config | _write(cfg, TOKENS) | marks


def differences(folder: str | Path, cfg: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(key, value in config.json of `folder`, value in `cfg`) of all that a config.json says and that differs.

    Raises UserError as read_config does.
    """
    theirs, ours = read_config(folder), _with_default_sections(cfg)
    keys = [*LANGUAGE, "rope_theta", "vision_layers"]
    if theirs.vision_layers and ours.vision_layers:
        keys += [*INDEXER, *VISION, *TOKENS, "mrope_section", "mrope_layout", "vision_position_grid"]
    pairs = [(key, getattr(theirs, key), getattr(ours, key)) for key in dict.fromkeys(keys)]
    return [(key, there, here) for key, there, here in pairs if there != here]


# ---- inside


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a Hugging Face folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a mapping, not {type(raw).__name__}")
    return raw


def _section(raw: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise UserError(f"{path}: {name} is missing")
    return raw[name]


def _read(raw: dict[str, Any], names: dict[str, str], path: Path, prefix: str) -> dict[str, Any]:
    values = {}
    for ours, theirs in names.items():
        if (value := raw.get(theirs)) is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or (ours not in OPTIONAL and value <= 0):
                raise UserError(f"{path}: {prefix}{theirs} = {value!r} is no positive number")
            values[ours] = value
        elif ours not in OPTIONAL:
            raise UserError(f"{path}: {prefix}{theirs} is missing")
    return values


def _read_rope(raw: dict[str, Any], path: Path, kind: str) -> dict[str, Any]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters (or rope_scaling) = {rope!r} is no mapping")
    kinds = {str(rope.get(key, "default")) for key in ("rope_type", "type")} - {"default", "mrope"}
    if kinds:
        raise UserError(f"{path}: rotary positions of type {min(kinds)!r} are not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise UserError(f"{path}: rope_theta is missing")
    if kind == QWEN:  # text alone has three equal ids, so that any split is the same; this one exists at every head_dim
        return {"rope_theta": theta, "mrope_section": [raw["head_dim"] // 2 - 2, 1, 1]}
    if "mrope_section" not in rope:
        raise UserError(f"{path}: rope_scaling.mrope_section is missing")
    layout = "interleaved" if rope.get("mrope_interleaved") else "chunked"
    return {"rope_theta": theta, "mrope_section": rope["mrope_section"], "mrope_layout": layout}


def _with_default_sections(cfg: ModelConfig) -> ModelConfig:
    """Sections that are the layout's own become None, as in a preset."""
    default = dataclasses.replace(cfg, mrope_section=None)
    try:
        return default if mrope_sections(default) == cfg.mrope_section else cfg
    except UserError:
        return cfg


def _check_fixed(raw: dict[str, Any], path: Path, norm_topk_default: bool) -> None:
    for key, (wanted, default) in {**FIXED, "norm_topk_prob": (True, norm_topk_default)}.items():
        value = default if raw.get(key) is None else raw[key]
        if value != wanted:
            raise UserError(f"{path}: {key} = {value!r} is not supported; this stack has {wanted!r}")


def _write(cfg: ModelConfig, names: dict[str, str]) -> dict[str, Any]:
    return {theirs: getattr(cfg, ours) for ours, theirs in names.items()}


def _tokens(cfg: ModelConfig) -> dict[str, Any]:
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOS}
    return {key: value for key, value in ids.items() if value < cfg.vocab_size}
