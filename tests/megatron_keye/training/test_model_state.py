"""Weights saved by any layout are read in one process, bit for bit and in their dtype."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing

import megatron_keye.model as m
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.model.init import initialize_weights
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import LanguageModel
from megatron_keye.model.transformer_config import language_config, vision_config
from megatron_keye.parallel import plan
from megatron_keye.training.model_state import load_model_state, model_state
from tests.parallel.launch import launch

CFG = m.build_config("keye_mini", vocab_size=512, image_token_id=510, video_token_id=511)
SEED = 7


def _save(parallel: ParallelConfig, dtype: torch.dtype, folder: str) -> None:
    groups = plan.initialize(parallel)
    config = language_config(CFG, parallel, dtype=dtype)
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    language = [LanguageModel(config, vp_stage=stage) for stage in stages]
    tower = VisionTower(vision_config(CFG, dtype=dtype), groups.vision)
    initialize_weights([*language, tower], CFG, SEED)
    dist_checkpointing.save(model_state(language, tower), folder)


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        (ParallelConfig(tensor=2, expert_tensor=2), torch.bfloat16),
        (ParallelConfig(expert=2), torch.float32),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), torch.bfloat16),
    ],
    ids=["tensor2-bf16", "expert2-fp32", "pipeline2x2-bf16"],
)
def test_any_layout_to_one_process(parallel, dtype, tmp_path):
    launch(_save, 2, parallel, dtype, str(tmp_path))

    wanted = m.build_model(CFG, dtype, seed=SEED)
    model = m.build_model(CFG, dtype, seed=SEED + 1)
    state = model_state([model.language_model], model.visual)
    load_model_state(dist_checkpointing.load(state, str(tmp_path)), [model.language_model], model.visual)

    expected = dict(wanted.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype is dtype, name
        assert torch.equal(parameter, expected[name]), name
    stored = dist_checkpointing.load_tensors_metadata(str(tmp_path))
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
