"""Keye-VL-2.0's configuration. The keys of a released config.json are kept under their released names."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

# The released sizes: what a key missing from config.json means.
VISION = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "image_size": 384,  # image_size // patch_size squared learned positions
    "spatial_merge_size": 2,
    "rope_theta": 10_000.0,
    "packing_positions": 32_768,
    "projector_norm_eps": 1e-5,
}
INDEXER = {
    "indexer_num_heads": 16,
    "indexer_head_dim": 64,
    "indexer_num_kv_heads": 1,
    "topk": 2048,
    "q_chunk_size": 512,  # queries computed at a time: bounds the memory
    "kv_chunk_size": 512,  # not used here
}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [16, 24, 24], "mrope_interleaved": False}
# What this model computes; a configuration that says otherwise is another model.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "output_router_logits": False,
}


class KeyeVL2Config(PreTrainedConfig):
    """`attention_mode` is "sparse" (each query attends to its top-k keys) or "dense" (to all keys before it).

    rope_parameters: {"rope_theta", "mrope_section" frequencies of (t, h, w), "mrope_interleaved"}; the older pair
    rope_theta and rope_scaling is read too. ValueError for what this model does not compute.
    """

    model_type = "KeyeVL2"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 1e7  # what transformers takes where none is given

    vocab_size: int = 151_936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    attention_mode: str = "sparse"
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    sa_config: dict[str, Any] = field(default_factory=dict)
    vision_config: dict[str, Any] = field(default_factory=dict)
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key, value in FIXED.items():
            given = kwargs.get(key, getattr(self, key, None))
            if given is not None and given != value:
                raise ValueError(f"{key} = {given!r} is not supported; Keye-VL-2.0 has {value!r}")
        if self.attention_mode not in ("sparse", "dense"):
            raise ValueError(f"attention_mode = {self.attention_mode!r} is neither 'sparse' nor 'dense'")
        self.sa_config = {**INDEXER, **(self.sa_config or {})}
        self.vision_config = {**VISION, **(self.vision_config or {})}
        self.ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved", "type"}
        super().__post_init__(**kwargs)
        self.rope_parameters = {**ROPE, **(self.rope_parameters or {})}
        # Which cache `generate` builds: one that holds the index keys beside keys and values.
        self.layer_types = ["indexed_attention"] * self.num_hidden_layers
        self._check_rope()

    def _check_rope(self) -> None:
        if self.rope_parameters["rope_type"] not in ("default", "mrope"):
            raise ValueError(f"rope_type = {self.rope_parameters['rope_type']!r} is not supported; only 'default' is")
        sections, dims = self.rope_parameters["mrope_section"], (self.head_dim, self.sa_config["indexer_head_dim"])
        scaled = [n * dims[1] / dims[0] for n in sections]
        if 2 * sum(sections) != dims[0] or any(n != int(n) for n in scaled):
            raise ValueError(
                f"mrope_section = {sections} must sum to head_dim / 2 = {dims[0] // 2} and scale by "
                f"{dims[1]}/{dims[0]} to whole numbers for the indexer"
            )
        if self.rope_parameters["mrope_interleaved"] and 3 * max(sections[1:]) > sum(sections):
            raise ValueError(f"mrope_section = {sections}: interleaved h and w get at most every third frequency")
