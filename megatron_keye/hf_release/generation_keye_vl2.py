"""What `generate` needs to know of Keye-VL-2.0: 3-axis positions, and pictures that belong to rows.

Supported: greedy, sampling, beams and several answers for a prompt, with pictures and clips, batches padded on the left.
Refused: padding on the right, continuing a cache without position_ids, assisted decoding and static caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .positions_keye_vl2 import pictures_of_rows, rope_positions

PICTURES = ("pixel_values", "grid_thw")


class KeyeVL2GenerationMixin(GenerationMixin):
    picture_ids: set[int]

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """-> int64 [3, B, T]"""
        cache, mask, grid = (model_kwargs.get(key) for key in ("past_key_values", "attention_mask", "grid_thw"))
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "position_ids are needed to continue from a cache: the new tokens do not tell where they stand"
            )
        is_token = torch.ones_like(inputs_tensor, dtype=torch.bool) if mask is None else mask.bool()
        grid = torch.empty(0, 3, dtype=torch.long) if grid is None else grid.cpu()
        return rope_positions(inputs_tensor, grid, self.picture_ids, is_token)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError(
                "generation goes on at the end of each row, which must be a token: pad prompts on the left"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs.get("pixel_values") is None:  # dropped once the pictures are in the cache
            inputs.pop("grid_thw", None)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, num_new_tokens: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        """The next token stands one above the greatest position on all axes, also right behind a picture."""
        before = model_kwargs["position_ids"]
        if num_new_tokens != 1:
            raise ValueError("assisted decoding is not supported by this model")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        following = before[..., -1:].amax(0, keepdim=True).expand_as(before[..., -1:]) + 1
        return {**model_kwargs, "position_ids": torch.cat([before, following], dim=-1)}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Rows are repeated, and their pictures with them."""
        pictures = {key: kwargs.pop(key) for key in PICTURES if kwargs.get(key) is not None}
        if expand_size > 1 and len(pictures) == 2 and input_ids is not None:
            pixels, grid = pictures["pixel_values"], pictures["grid_thw"]
            frames = pixels.split(grid.prod(-1).tolist())
            order = [
                i
                for row in pictures_of_rows(input_ids, grid.cpu(), self.picture_ids)
                for i in [*range(row.start, row.stop)] * expand_size
            ]
            if order:
                pictures = {"pixel_values": torch.cat([frames[i] for i in order]), "grid_thw": grid[order]}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **pictures}
