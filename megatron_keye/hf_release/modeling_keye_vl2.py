"""Keye-VL-2.0 for `transformers`: a mixture-of-experts language model with sparse attention, a vision tower, a projector.

Eager, for one device, written from the definition; module names give the released tensor names. `generate` works with the
default dynamic cache, which holds the index keys beside keys and values. Shapes: B rows, T new tokens, S tokens cached
and new, V vocabulary, P patches and N pictures and frames of a whole batch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_keye_vl2 import Angles, KeyeVL2Attention, LayerNorm, RMSNorm, rotary_angles
from .configuration_keye_vl2 import KeyeVL2Config
from .generation_keye_vl2 import KeyeVL2GenerationMixin
from .positions_keye_vl2 import pictures_of_rows, rope_positions
from .vision_keye_vl2 import KeyeVL2Projector, KeyeVL2Vision

# Checkpoints with one tensor for each expert's matrix, as plain Qwen3-MoE has, are stacked while they are read.
register_checkpoint_conversion_mapping(
    "KeyeVL2",
    [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0), Transpose(1, 2)]
        ),
    ],
    overwrite=True,
)


# What transformers' own loops pass along to every model.
IGNORED = ("return_dict", "num_items_in_batch")


class KeyeVL2Experts(nn.Module):
    """SwiGLU experts, stacked; matrices multiply from the right."""

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        experts, hidden, ffn = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * ffn))
        self.down_proj = nn.Parameter(torch.empty(experts, ffn, hidden))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [n, hidden], the experts chosen for each token [n, k] and their weights -> [n, hidden]"""
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = (F.silu(gate) * up) @ self.down_proj[expert]
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out


class KeyeVL2MoE(nn.Module):
    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = KeyeVL2Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; the router works in fp32."""
        probabilities = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        weights, chosen = probabilities.topk(self.topk, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)).view_as(x)


class KeyeVL2Layer(nn.Module):
    def __init__(self, config: KeyeVL2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = KeyeVL2Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = KeyeVL2MoE(config)

    def forward(self, x: Tensor, angles: Angles, is_token: Tensor, cache: DynamicCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, is_token, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class KeyeVL2LanguageModel(nn.Module):
    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KeyeVL2Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, position_ids: Tensor, is_token: Tensor, cache: DynamicCache | None) -> Tensor:
        """Embeddings [B, T, hidden], position_ids [3, B, T], is_token bool [B, S] -> [B, T, hidden]"""
        rope, dim, index_dim = (
            self.config.rope_parameters,
            self.config.head_dim,
            self.config.sa_config["indexer_head_dim"],
        )
        sections = rope["mrope_section"]
        index_sections = [n * index_dim // dim for n in sections]
        angles = (
            rotary_angles(position_ids, dim, sections, rope),
            rotary_angles(position_ids, index_dim, index_sections, rope),
        )
        for layer in self.layers:
            x = layer(x, angles, is_token, cache)
        return self.norm(x)


class KeyeVL2PreTrainedModel(PreTrainedModel):
    config_class = KeyeVL2Config
    base_model_prefix = "model"
    _no_split_modules = ("KeyeVL2Layer", "VisionLayer")

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, KeyeVL2Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            nn.init.ones_(module.weight)
            if isinstance(module, LayerNorm):
                nn.init.zeros_(module.bias)


class KeyeVL2MoeForConditionalGeneration(KeyeVL2PreTrainedModel, KeyeVL2GenerationMixin):
    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__(config)
        vision = SimpleNamespace(**config.vision_config)
        self.visual = KeyeVL2Vision(vision)
        self.mlp_AR = KeyeVL2Projector(vision, config.hidden_size)
        self.model = KeyeVL2LanguageModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.picture_ids = {config.image_token_id, config.video_token_id}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fill this model exactly is a ValueError."""
        kwargs["ignore_mismatched_sizes"] = True  # they are named below
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        faults = {
            "missing": "missing_keys",
            "not part of the model": "unexpected_keys",
            "of another shape": "mismatched_keys",
        }
        for what, key in faults.items():
            if found := sorted(map(str, info[key])):
                raise ValueError(f"{len(found)} tensors are {what} (first: {found[0]})")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def picture_tokens(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values [P, 3, 14, 14], grid_thw [N, 3] -> [P / 4, hidden], picture by picture."""
        sizes = grid_thw.prod(-1).tolist()
        if sum(sizes) != len(pixel_values):
            raise ValueError(f"pixel_values hold {len(pixel_values)} patches, but grid_thw describes {sum(sizes)}")
        tokens = []
        for pixels, (_, height, width) in zip(pixel_values.split(sizes), grid_thw.tolist()):
            features = self.visual.vision_model(pixels, height, width)
            tokens.append(self.mlp_AR(features, height, width))
        return torch.cat(tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, V] (of the last `logits_to_keep` tokens, 0: all), and with labels the mean loss.

        attention_mask [B, S], 0 at padding, which may stand on either side. position_ids [3, B, T], None: computed, which
        needs the tokens from the start. pixel_values [P, 3, 14, 14] normalised, in raster order; grid_thw [N, 3] in patches,
        t = 1 for each picture or frame, dealt out to the rows in order. labels [B, T]: shifted here, -100 ignored; the
        language-model loss alone. past_key_values: DynamicCache(config=model.config). ValueError where inputs disagree.
        """
        if unknown := sorted(
            key for key, value in kwargs.items() if key not in IGNORED and value is not None and value is not False
        ):
            raise ValueError(f"{', '.join(unknown)}: not supported by this model")
        B, T = input_ids.shape
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(
                f"a {type(past_key_values).__name__} is not supported; use DynamicCache(config=model.config)"
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_token = self._is_token(attention_mask, B, past + T, input_ids.device)
        grid = torch.empty(0, 3, dtype=torch.long) if grid_thw is None else grid_thw.cpu()
        if position_ids is None:
            if past:
                raise ValueError(
                    "position_ids are needed behind a cache: the tokens given do not tell where they stand"
                )
            position_ids = rope_positions(input_ids, grid, self.picture_ids, is_token)
        elif position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)

        x = self.model.embed_tokens(input_ids)
        if len(grid) or not past:  # behind a cache, a picture token that was generated is a token like any other
            pictures_of_rows(input_ids, grid, self.picture_ids)  # counts agree, or a ValueError
        if len(grid):
            if pixel_values is None:
                raise ValueError("grid_thw describes pictures, but there are no pixel_values")
            where = torch.isin(input_ids, torch.tensor(sorted(self.picture_ids), device=input_ids.device))
            x = x.masked_scatter(where[..., None], self.picture_tokens(pixel_values, grid).to(x.dtype))
        x = self.model(x, position_ids, is_token, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    @staticmethod
    def _is_token(attention_mask: Tensor | None, rows: int, keys: int, device: torch.device) -> Tensor:
        if attention_mask is None:
            return torch.ones(rows, keys, dtype=torch.bool, device=device)
        if attention_mask.shape != (rows, keys):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} and must be [{rows}, {keys}], cached tokens first"
            )
        return attention_mask.bool()
