"""The language model: Megatron's GPTModel with Keye's attention, 3-axis positions and picture embeddings put in place.

Shapes: b rows, s tokens of this context rank, n tokens to be predicted, h hidden.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as ps
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from keye_data.sample import IGNORE
from megatron_keye.model.attention import KeyeAttentionSubmodules, KeyeSelfAttention, SparseCoreAttention
from megatron_keye.model.backend import backend
from megatron_keye.model.indexer import Indexer
from megatron_keye.model.names import links
from megatron_keye.model.positions import rotary_angles
from megatron_keye.model.router import RowRouter
from megatron_keye.model.transformer_config import KeyeTransformerConfig


def decoder_spec(config: KeyeTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage."""
    parts = backend()
    norm = parts.layer_norm(rms_norm=True)
    qk_norm = parts.layer_norm(rms_norm=True, for_qk=True)
    attention = ModuleSpec(
        module=KeyeSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=KeyeAttentionSubmodules(
            linear_qkv=parts.column_parallel_linear(),
            core_attention=SparseCoreAttention,
            linear_proj=parts.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
            indexer=Indexer,
        ),
    )
    mlp = get_moe_module_spec_for_backend(
        backend=parts, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    mlp.submodules.router = RowRouter
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


class LanguageModel(GPTModel):
    """One pipeline stage of the decoder."""

    def __init__(self, config: KeyeTransformerConfig, vp_stage: int | None = None):
        keye = config.keye
        super().__init__(
            config,
            decoder_spec(config, vp_stage),
            vocab_size=keye.vocab_size,
            max_sequence_length=keye.max_position_embeddings,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            position_embedding_type="none",  # angles are computed from the 3-axis ids below
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        # Megatron marks sharded weights where it draws them, and here they are drawn elsewhere. Without the mark
        # the gradient norm would leave out the shards of every rank but the first.
        for _, parameter, link in links(self, keye):
            if link.shard != "none" and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, 1 if link.shard == "columns" else 0, 1)
        if self.post_process:
            # The rows to predict are gathered and chosen before the head, so the head itself sees whole rows.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1

    def forward(
        self,
        input_ids: torch.Tensor,  # int64 [b, s]
        position_ids: torch.Tensor,  # int64 [3, b, s]
        key_ranges: torch.Tensor,  # int32 [2, b, s]
        visual: torch.Tensor | None = None,  # [picture tokens among this rank's s / tp, h], in row order
        targets: torch.Tensor | None = None,  # int64 [b, s], IGNORE where nothing is predicted
    ) -> torch.Tensor:
        """-> on the last stage logits [b, s, V], or with targets the losses [n]; on other stages hidden states."""
        hidden = self.embed(input_ids, visual) if self.pre_process else None
        padding = key_ranges[0] == key_ranges[1]
        if self.config.sequence_parallel:
            padding = scatter_to_sequence_parallel_region(padding.t().contiguous()).t().contiguous()
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=key_ranges,
            rotary_pos_emb=rotary_angles(self.config.keye, position_ids),
            padding_mask=padding,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.transpose(0, 1)  # [b, s, h]
        if targets is None:
            logits, _ = self.output_layer(hidden, runtime_gather_output=True)
            return logits
        wanted = targets != IGNORE
        logits, _ = self.output_layer(hidden[wanted][:, None])
        return vocab_parallel_cross_entropy(logits.float(), targets[wanted][:, None])[:, 0]

    def embed(self, input_ids: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """-> [s / tp, b, h]: text embeddings with the pictures' in their places; `visual` are those of these tokens."""
        hidden = self.embedding(input_ids=input_ids, position_ids=None)
        if self.config.sequence_parallel:
            input_ids = input_ids.chunk(self.config.tensor_model_parallel_size, 1)[ps.get_tensor_model_parallel_rank()]
        if visual is not None and len(visual):
            where = visual_mask(input_ids, self.config.keye.image_token_id, self.config.keye.video_token_id)
            rows = hidden.transpose(0, 1)
            hidden = rows.masked_scatter(where[..., None], visual.to(rows.dtype)).transpose(0, 1).contiguous()
        if self.training and torch.is_grad_enabled() and not hidden.requires_grad:
            # With frozen embeddings and no picture here, backward must still run: other ranks' collectives wait
            # for it, and a checkpointed layer with no input to differentiate would not be run again.
            hidden.requires_grad_()
        return hidden


def visual_mask(input_ids: torch.Tensor, image_token_id: int, video_token_id: int) -> torch.Tensor:
    return (input_ids == image_token_id) | (input_ids == video_token_id)
