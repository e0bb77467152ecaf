"""The `model` section: Keye's shapes, by preset, with every value open to override.

The figures of `keye_vl2_30b_a3b` are the released model's; they reproduce its parameter count exactly
(tests/megatron_keye/model/test_counts.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_keye.config import schema
from megatron_keye.errors import UserError

ATTENTION_MODES = ("dense", "warmup", "sparse")


@dataclass
class ModelConfig:
    preset: str = "keye_vl2_30b_a3b"

    # language model (Qwen3-30B-A3B)
    num_layers: int = 48
    hidden_size: int = 2048
    num_attention_heads: int = 32
    num_query_groups: int = 4
    head_dim: int = 128
    num_experts: int = 128
    experts_per_token: int = 8
    moe_ffn_hidden_size: int = 768
    router_aux_loss_coeff: float = 0.001
    vocab_size: int = 151_936
    max_position_embeddings: int = 262_144
    rope_theta: float = 1e7
    mrope_layout: str = "chunked"  # chunked (Qwen2.5-VL) | interleaved (Qwen3-VL); not published; our default
    mrope_section: list[int] | None = None  # frequencies per axis (t, h, w); None = the layout's own at this head_dim
    rms_norm_eps: float = 1e-6
    init_std: float = 0.02

    # sparse attention
    attention_mode: str = "dense"  # dense | warmup (dense output, indexer learns) | sparse
    indexer_heads: int = 16  # 0 together with vision_layers 0: plain Qwen3-MoE, without indexers and vision tower
    indexer_head_dim: int = 64
    topk: int = 2048
    indexer_fake_fp8: bool = False  # quantise indexer q and k as serving does; whether Kwai trained so is not published
    deterministic_attention: bool = False
    grouped_experts: bool | None = None  # grouped matrix products, or one expert after another; None = grouped on CUDA
    attention_backend: str | None = None  # reference | torch | triton; None = triton on CUDA, torch on CPU

    # vision encoder (SigLIP-so400m lineage) and projector
    vision_layers: int = 27
    vision_hidden_size: int = 1152
    vision_heads: int = 16
    vision_ffn_hidden_size: int = 4304
    vision_position_grid: int = 27
    vision_packing_positions: int = 32_768  # unused by the model, carried through conversion
    vision_layer_norm_eps: float = 1e-6
    vision_rope_theta: float = 10_000.0
    patch_size: int = 14
    merge_size: int = 2
    projector_norm_eps: float = 1e-5

    # ids that the model itself must know
    image_token_id: int = 151_655
    video_token_id: int = 151_656


# What may differ between two phases of one model: how it attends and computes, not what it is.
BEHAVIOUR = ("preset", "attention_mode", "topk", "indexer_fake_fp8", "deterministic_attention", "grouped_experts", "attention_backend",
             "router_aux_loss_coeff", "init_std", "max_position_embeddings", "rope_theta")  # fmt: skip


def check_same_model(where: object, saved: dict[str, Any], model: ModelConfig) -> None:
    """`saved`: a ModelConfig's values, found at `where`. Raises UserError naming the first key that makes another model."""
    for key, value in asdict(model).items():
        if key not in BEHAVIOUR and key in saved and saved[key] != value:
            raise UserError(
                f"{where} holds another model: model.{key} is {saved[key]} there and {value} in this recipe; "
                "use another run_dir or init_from, or set the model as it was"
            )


PRESETS: dict[str, dict[str, object]] = {
    "keye_vl2_30b_a3b": {},
    "keye_mini": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 64,
        "num_experts": 8,
        "experts_per_token": 2,
        "moe_ffn_hidden_size": 64,
        "max_position_embeddings": 32_768,
        "indexer_heads": 4,
        "indexer_head_dim": 32,
        "topk": 64,
        "vision_layers": 2,
        "vision_hidden_size": 64,
        "vision_heads": 2,
        "vision_ffn_hidden_size": 128,
        "vision_packing_positions": 64,
    },
}


def preset_values(name: str) -> dict[str, object]:
    """What a preset sets, its own name included. Raises UserError for an unknown one."""
    if name not in PRESETS:
        near = schema.nearest(name, PRESETS)
        raise UserError(f"model.preset = {name!r} is none of {', '.join(PRESETS)}; the nearest is {near!r}")
    return {"preset": name, **PRESETS[name]}


def build_config(preset: str, **overrides: object) -> ModelConfig:
    """A preset with keys of the model section overridden. Raises UserError for an unknown preset or key or a wrong type."""
    where = "build_config"
    return schema.instance(ModelConfig, schema.typed(ModelConfig, {**preset_values(preset), **overrides}, where), where)
