"""Keye's self-attention: Megatron's SelfAttention with the lightning indexer and a core attention of our own plugged in.

Megatron's `attention_mask` argument carries the key ranges [2, b, s]: which keys of its row each query may see, in
global coordinates. Causality, packed documents, padding and context parallelism are all in there.
Shapes: s local tokens, S keys of the whole row, b rows, H query heads and G KV heads of this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule

from keye_kernels import dsa
from megatron_keye.model.health import measure
from megatron_keye.model.indexer import AttachLoss
from megatron_keye.model.positions import rotate
from megatron_keye.model.transformer_config import KeyeTransformerConfig
from megatron_keye.parallel.context import gather_keys, rows_first


@dataclass
class KeyeAttentionSubmodules(SelfAttentionSubmodules):
    indexer: Any = None


class SparseCoreAttention(MegatronModule):
    """Dense, warm-up or sparse attention over key ranges, with the indexer's KL attached to the output."""

    def __init__(self, config: KeyeTransformerConfig, layer_number: int, *_, pg_collection=None, **__):
        super().__init__(config=config)
        self.context_group, self.tensor_group = pg_collection.cp, pg_collection.tp
        self.layer_number = layer_number  # of the whole model, from 1
        self.kl_sum: torch.Tensor | None = None  # of all tokens since the trainer last took it
        self.probing = False  # forwards measure the indexer, into `health`
        self.health: torch.Tensor | None = None

    def forward(
        self,
        query: torch.Tensor,  # [s, b, H, D]
        key: torch.Tensor,  # [s, b, G, D]
        value: torch.Tensor,
        key_ranges: torch.Tensor,  # int32 [2, b, s]
        *indexer_outputs: torch.Tensor,  # iq [s, b, Hi, Di], ik [s, b, Di], iw [s, b, Hi], or nothing
    ) -> torch.Tensor:
        """-> [s, b, H * D]"""
        keye = self.config.keye
        s, b = query.shape[:2]
        # The first pass of a recomputed layer has no gradient, and needs no loss.
        learns = bool(self.config.indexer_loss_weight) and self.training and torch.is_grad_enabled()
        # The small ik travels first; K and V travel behind it, while keys are scored and selected.
        if indexer_outputs:
            iq, ik, iw = indexer_outputs if learns else (x.detach() for x in indexer_outputs)
            (ik,), wait_for_ik = gather_keys(self.context_group, ik)
        (k, v), wait_for_kv = gather_keys(self.context_group, key, value)
        q = rows_first(query)
        start, stop = flat_ranges(key_ranges, len(k) // b)
        backend = keye.attention_backend
        if not indexer_outputs:
            wait_for_kv()
            out, _ = dsa.dense_attention(q, k, v, start, stop, backend=backend)
        else:
            iq, iw = rows_first(iq), rows_first(iw)
            wait_for_ik()
            out, kl = dsa.dsa_attention(
                q, k, v, iq, ik, iw, start, stop, keye.topk, keye.attention_mode, backend,
                deterministic=keye.deterministic_attention, fake_fp8=keye.indexer_fake_fp8, wait=wait_for_kv,
                return_kl=learns, teacher_group=self.tensor_group if self.tensor_group.size() > 1 else None,
            )  # fmt: skip
            if kl is not None:
                self.kl_sum = kl.detach().sum() + (0 if self.kl_sum is None else self.kl_sum)
                out = AttachLoss.apply(out, kl, self.config.indexer_loss_weight)
            if self.probing:
                found = measure(
                    q, k, iq, ik, iw, start, stop, keye.topk,
                    quantised=keye.indexer_fake_fp8, backend=backend, tensor_group=self.tensor_group,
                )  # fmt: skip
                self.health = found if self.health is None else self.health + found  # a recomputed layer counts twice
        return out.view(b, s, -1).transpose(0, 1).contiguous()


class KeyeSelfAttention(SelfAttention):
    """SelfAttention whose forward also runs the indexer on the normalised hidden states."""

    def __init__(self, config: KeyeTransformerConfig, submodules: KeyeAttentionSubmodules, *args, **kwargs):
        super().__init__(config, submodules, *args, **kwargs)
        if config.keye.indexer_heads:
            self.indexer = submodules.indexer(config=config, pg_collection=self.pg_collection)

    def forward(self, hidden_states, attention_mask, *_, rotary_pos_emb=None, **__):
        """hidden_states [s / tp, b, hidden]; attention_mask: key ranges; rotary_pos_emb: positions.rotary_angles."""
        keye = self.config.keye
        angles, indexer_angles = rotary_pos_emb.tensor_split([keye.head_dim // 2], dim=-1)
        query, key, value = self.get_query_key_value_tensors(hidden_states)[:3]
        indexer_outputs: tuple[torch.Tensor, ...] = ()
        if keye.attention_mode == "sparse" or (self.config.indexer_loss_weight and self.training):
            indexer_outputs = self.indexer(hidden_states, indexer_angles)
        query, key = rotate(query, angles), rotate(key, angles)
        attend = partial(checkpoint, self.core_attention, False) if self._recomputes else self.core_attention
        return self.linear_proj(attend(query, key, value, attention_mask, *indexer_outputs))

    @property
    def _recomputes(self) -> bool:
        return self.checkpoint_core_attention and self.training and torch.is_grad_enabled()


def flat_ranges(key_ranges: torch.Tensor, keys_per_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges within each row [2, b, s] -> two [b * s] vectors of ranges along the joined key axis."""
    rows = torch.arange(key_ranges.shape[1], dtype=torch.int32, device=key_ranges.device) * keys_per_row
    start, stop = (key_ranges + rows[None, :, None]).flatten(1)
    return start, stop
