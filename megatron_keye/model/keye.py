"""Keye whole: language model, vision encoder and projector.

`VisionTower` and `LanguageModel` are what the trainer shards; `KeyeModel` joins them in one process.
Shapes: B rows of T tokens, P patches, N pictures and frames.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import nn

from keye_data.positions import mrope_positions
from keye_data.sample import IGNORE
from megatron_keye.config.model import ModelConfig
from megatron_keye.errors import UserError
from megatron_keye.model.language import LanguageModel, visual_mask
from megatron_keye.model.projector import Projector, merged_tokens
from megatron_keye.model.transformer_config import KeyeTransformerConfig, language_config, vision_config
from megatron_keye.model.vision import VisionEncoder
from megatron_keye.parallel import plan


class VisionTower(MegatronModule):
    """Pixels to tokens: encoder, then projector."""

    def __init__(self, config: KeyeTransformerConfig, groups: ProcessGroupCollection):
        super().__init__(config=config)
        self.vision_model = VisionEncoder(config, groups)
        self.projector = Projector(config)

    def forward(self, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """patches [P, 3, 14, 14] normalised, grid int64 [N, 2] -> [P / 4, hidden]"""
        return self.projector(self.vision_model(patches, grid), grid)


class KeyeModel(nn.Module):
    """The whole model in one process. `visual` is None for a language model alone (vision_layers = 0)."""

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        plan.single_process()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.cfg = cfg
        self.language_model = LanguageModel(language_config(cfg, dtype=dtype))
        self.visual = VisionTower(vision_config(cfg, dtype=dtype), groups) if cfg.vision_layers else None

    @property
    def parts(self) -> list[nn.Module]:
        """What it is made of: the language model and, where there is one, the vision tower."""
        return [self.language_model] if self.visual is None else [self.language_model, self.visual]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids [B, T], right-padded rows -> logits [B, T, V]; with labels, the mean language-model loss.

        position_ids [3, B, T], None: computed; pixel_values [P, 3, 14, 14] normalised, raster order; grid_thw [N, 3] in
        patches, t = 1 per picture or frame; labels as in transformers: positions of input_ids, shifted here, -100 ignored.
        """
        B, T = input_ids.shape
        visual = None
        if self.visual is None:
            if pixel_values is not None or grid_thw is not None:
                raise UserError("this model has no vision tower; give it text alone")
            if position_ids is None:
                position_ids = torch.arange(T, device=input_ids.device).expand(3, B, T)
        else:
            grid = _two_columns(grid_thw, input_ids.device)
            self._check_counts(input_ids, grid)
            if len(grid):
                if pixel_values is None:
                    raise UserError("grid_thw describes pictures, but there are no pixel_values")
                visual = self.visual(pixel_values, grid)
            if position_ids is None:
                position_ids = self._positions(input_ids, grid)
        stop = torch.arange(1, T + 1, dtype=torch.int32, device=input_ids.device).expand(B, T)
        ranges = torch.stack([torch.zeros_like(stop), stop])
        if labels is None:
            return self.language_model(input_ids, position_ids, ranges, visual)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return self.language_model(input_ids, position_ids, ranges, visual, targets).mean()

    def _check_counts(self, input_ids: torch.Tensor, grid: torch.Tensor) -> None:
        places = int(visual_mask(input_ids, self.cfg.image_token_id, self.cfg.video_token_id).sum())
        tokens = int(merged_tokens(grid, self.cfg.merge_size).sum())
        if places != tokens:
            raise UserError(f"input_ids have {places} picture tokens, but grid_thw describes {tokens}")

    def _positions(self, input_ids: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Row by row; the pictures are dealt out to the rows in order."""
        ends = merged_tokens(grid, self.cfg.merge_size).cumsum(0).cpu().numpy()  # tokens up to and with each picture
        is_visual = visual_mask(input_ids, self.cfg.image_token_id, self.cfg.video_token_id)
        row_ends = is_visual.sum(1).cumsum(0).cpu().numpy()
        rows, first = [], 0
        for ids, last in zip(input_ids.cpu().numpy(), np.searchsorted(ends, row_ends, side="right")):
            rows.append(mrope_positions(ids, grid[first:last], self.cfg.image_token_id, self.cfg.video_token_id))
            first = last
        return torch.as_tensor(np.stack(rows, axis=1), device=input_ids.device)


def _two_columns(grid_thw: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if grid_thw is None:
        return torch.zeros(0, 2, dtype=torch.int64, device=device)
    if bool((grid_thw[:, 0] != 1).any()):
        raise UserError("grid_thw: t must be 1 for every picture and frame; give a video's frames as rows of their own")
    return grid_thw[:, 1:].to(torch.int64)


def build_model(cfg: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 1234) -> KeyeModel:
    """The model with random weights; under `torch.device("meta")` with none at all."""
    from megatron_keye.model.init import initialize_weights

    model = KeyeModel(cfg, dtype)
    if not next(model.parameters()).is_meta:
        initialize_weights(model.parts, cfg, seed)
    return model
