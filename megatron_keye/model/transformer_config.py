"""From a recipe's sections to Megatron's TransformerConfig, one for the language model and one for the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.model.backend import has_transformer_engine
from megatron_keye.model.experts import grouped_by_torch
from megatron_keye.model.known_faults import refuse_known_faults


@dataclass
class KeyeTransformerConfig(TransformerConfig):
    """Megatron's configuration, and Keye's own beside it."""

    keye: ModelConfig = field(default_factory=ModelConfig)
    indexer_loss_weight: float = 0.0  # 0: the indexer's KL is not computed (evaluation, dense stages)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_known_faults(self)


# What a machine without Transformer Engine's and Apex's kernels can run.
UNFUSED = dict(
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    apply_rope_fusion=False,
    persist_layer_norm=False,
    moe_permute_fusion=False,
)


# What of a layer is computed again in backward. The vision tower has its own way, see parallel/vision.py.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "moe": dict(recompute_granularity="selective", recompute_modules=["moe"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def language_config(
    cfg: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    indexer_loss_weight: float = 0.0,
    router_aux_loss_coeff: float = 0.0,
    recompute: str = "none",
) -> KeyeTransformerConfig:
    """The language model's configuration. Both loss weights are 0 unless a trainer sets them.

    router_aux_loss_coeff counts as in transformers, whose loss is experts_per_token at perfect balance and a mean over
    layers. Megatron's is 1 there, and every layer adds its own.
    """
    p = parallel or ParallelConfig()
    return KeyeTransformerConfig(
        keye=cfg,
        indexer_loss_weight=indexer_loss_weight,
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_query_groups=cfg.num_query_groups,
        kv_channels=cfg.head_dim,
        ffn_hidden_size=cfg.moe_ffn_hidden_size,
        num_moe_experts=cfg.num_experts,
        moe_router_topk=cfg.experts_per_token,
        moe_ffn_hidden_size=cfg.moe_ffn_hidden_size,
        moe_router_dtype="fp32",
        moe_router_pre_softmax=False,  # softmax over the chosen equals softmax over all, renormalised
        moe_router_load_balancing_type="seq_aux_loss" if router_aux_loss_coeff else "none",
        moe_aux_loss_coeff=router_aux_loss_coeff * cfg.experts_per_token / cfg.num_layers,
        moe_token_dispatcher_type=p.dispatcher,
        moe_grouped_gemm=has_transformer_engine() or grouped_by_torch(cfg.grouped_experts, dtype),
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=cfg.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        tensor_model_parallel_size=p.tensor,
        sequence_parallel=p.tensor > 1,
        context_parallel_size=p.context,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline,
        expert_model_parallel_size=p.expert,
        expert_tensor_parallel_size=p.expert_tensor,
        # Between two stages with interleaving, batched messages of both directions can be taken for each other.
        overlap_p2p_comm=p.virtual_pipeline is not None,
        batch_p2p_comm=p.virtual_pipeline is None,
        deallocate_pipeline_outputs=False,  # with gloo's asynchronous sends: use after free
        variable_seq_lengths=False,
        **RECOMPUTE[recompute],
        **_common(dtype),
    )


def vision_config(cfg: ModelConfig, *, dtype: torch.dtype = torch.float32) -> KeyeTransformerConfig:
    """The vision encoder's: never sharded, whatever the language model's layout."""
    return KeyeTransformerConfig(
        keye=cfg,
        num_layers=cfg.vision_layers,
        hidden_size=cfg.vision_hidden_size,
        num_attention_heads=cfg.vision_heads,
        ffn_hidden_size=cfg.vision_ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=cfg.vision_layer_norm_eps,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_qkv_bias=True,
        **{**_common(dtype), "add_bias_linear": True},
    )


def _common(dtype: torch.dtype) -> dict:
    return dict(
        UNFUSED,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        perform_initialization=False,  # weights are drawn per released tensor name (init.py), the same in every layout
        use_cpu_initialization=False,  # True would give experts of equal local number equal weights
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # losses are sums; the trainer divides once by a global count
    )
