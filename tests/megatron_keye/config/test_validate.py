"""Layouts and values: each fault one line with the nearest valid choice, and no fault where there is none."""

from __future__ import annotations

import pytest

from megatron_keye.config import layout
from megatron_keye.config.data import SourceConfig
from megatron_keye.config.model import build_config
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.validate import validate
from megatron_keye.errors import UserError


def recipe(preset="keye_mini", **changes) -> Recipe:
    """A valid recipe with dotted keys changed: `parallel__tensor=2`."""
    made = Recipe(model=build_config(preset))
    made.data.tokenizer = "tok"
    made.data.sources = [SourceConfig(path="a")]
    made.data.seq_length = 1024
    made.data.image.max_tokens = 64
    made.data.video.min_frame_tokens, made.data.video.total_tokens = 4, 256
    for key, value in changes.items():
        section, name = made, key
        while "__" in name:
            part, name = name.split("__", 1)
            section = getattr(section, part)
        assert hasattr(section, name)
        setattr(section, name, value)
    return made


VALID = [
    (1, {}),
    (2, {}),
    (2, {"parallel__expert": 2}),
    (2, {"parallel__tensor": 2, "parallel__expert_tensor": 2}),
    (2, {"parallel__tensor": 2, "parallel__expert": 2}),
    (2, {"parallel__expert": 2, "parallel__dispatcher": "flex", "optimizer__offload_fraction": 1.0}),
    (2, {"parallel__context": 2}),
    (2, {"parallel__pipeline": 2}),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    (8, {"parallel__tensor": 2, "parallel__context": 2, "parallel__pipeline": 2, "parallel__expert": 4}),
    (1, {"model__attention_mode": "warmup", "training__scope": "indexers"}),
    (1, {"model__attention_mode": "sparse", "training__scope": "all"}),
    (1, {"model__attention_mode": "sparse", "training__scope": "indexers"}),
    (1, {"model__attention_mode": "sparse", "training__scope": "all_but_indexers"}),
    (1, {"model__mrope_layout": "interleaved"}),
    (1, {"training__scope": "projector"}),
]


@pytest.mark.parametrize("world, changes", VALID, ids=str)
def test_valid(world, changes):
    assert validate(recipe(**changes), world) == []


LAYOUT_FAULTS = [
    (3, {"parallel__tensor": 3}, ["parallel.tensor = 3", "num_query_groups", "the nearest is 2"]),
    (4, {"parallel__tensor": 4, "parallel__expert": 4}, ["parallel.tensor = 4", "(2)", "the nearest is 2"]),
    (3, {"parallel__expert": 3}, ["parallel.expert = 3", "num_experts (8)", "the nearest is 2"]),
    (6, {"parallel__expert": 2, "parallel__expert_tensor": 3}, ["parallel.expert_tensor = 3", "the nearest is 2"]),
    (3, {"parallel__pipeline": 3}, ["parallel.pipeline = 3", "num_layers (4)", "the nearest is 2"]),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3}, ["virtual_pipeline = 3", "the nearest is 2"]),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 1}, ["virtual_pipeline = 1", "the nearest is null"]),
    (1, {"parallel__virtual_pipeline": 2}, ["parallel.virtual_pipeline = 2", "pipeline of 2 or more"]),
    (2, {"parallel__context": 2, "data__seq_length": 1026}, ["data.seq_length = 1026", "1024 or 1028"]),
    (2, {"parallel__tensor": 2, "parallel__expert": 2, "data__seq_length": 1025}, ["1025", "1024 or 1026"]),
    (3, {"parallel__context": 2}, ["3 ranks", "tensor x context x pipeline = 2", "2 or 4 ranks"]),
    (6, {"parallel__expert": 4}, ["6 ranks", "expert_tensor x expert x pipeline = 4", "4 or 8 ranks"]),
    (2, {"training__global_batch_size": 3}, ["global_batch_size = 3", "2 data-parallel ranks", "2 or 4"]),
    (1, {"training__micro_batch_size": 3}, ["global_batch_size = 8", "6 or 9"]),
    (
        2,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "training__global_batch_size": 3},
        ["interleaved", "2 or 4"],
    ),
]

VALUE_FAULTS = [
    ({"model__attention_mode": "spares"}, ["model.attention_mode = 'spares'", "nearest is 'sparse'"]),
    ({"model__mrope_layout": "interlaced"}, ["model.mrope_layout = 'interlaced'", "'interleaved'"]),
    ({"training__scope": "indexer"}, ["training.scope = 'indexer'", "'indexers'"]),
    ({"training__precision": "fp16"}, ["training.precision = 'fp16'", "'bf16'"]),
    ({"optimizer__schedule": "cosin"}, ["optimizer.schedule = 'cosin'", "'cosine'"]),
    ({"logging__wandb": "ofline"}, ["logging.wandb = 'ofline'", "'offline'"]),
    ({"data__video__backend": "PyAV"}, ["data.video.backend = 'PyAV'", "'pyav'"]),
    ({"parallel__dispatcher": "all2all"}, ["parallel.dispatcher = 'all2all'", "'alltoall'"]),
    ({"parallel__dispatcher": "flex"}, ["parallel.dispatcher = 'flex'", "'alltoall'"]),
    ({"training__recompute": "some"}, ["training.recompute = 'some'", "none, selective, moe, full"]),
    ({"optimizer__offload_fraction": 1.5}, ["optimizer.offload_fraction = 1.5", "nearest is 1"]),
    (
        {"optimizer__offload_fraction": 0.5, "training__precision": "fp32"},
        ["optimizer.offload_fraction", "set it to 0"],
    ),
    ({"parallel__tensor": 0}, ["parallel.tensor = 0 must be 1 or more"]),
    ({"training__steps": -1}, ["training.steps = -1 must be 1 or more"]),
    ({"optimizer__lr": -1.0}, ["optimizer.lr = -1.0 must be 0 or more"]),
    ({"optimizer__lr": float("nan")}, ["optimizer.lr = nan must be a finite number"]),
    ({"data__video__fps": 0.0}, ["data.video.fps = 0.0 must be above 0"]),
    ({"data__sources": []}, ["data.sources is empty"]),
    ({"data__sources": [SourceConfig(path="a", weight=0.0)]}, ["data.sources.0.weight = 0.0"]),
    ({"data__image__min_tokens": 100}, ["data.image.min_tokens = 100", "data.image.max_tokens = 64"]),
    ({"data__video__total_tokens": 4}, ["data.video.total_tokens = 4", "8 or more"]),
    ({"data__video__timestamp_format": "{minutes}"}, ["data.video.timestamp_format", "minutes"]),
    ({"data__seq_length": 65_536}, ["data.seq_length = 65536", "nearest is 32768"]),
    ({"optimizer__warmup_steps": 1000}, ["optimizer.warmup_steps = 1000", "nearest is 999"]),
    ({"optimizer__schedule": "wsd", "optimizer__decay_steps": 1001}, ["decay_steps = 1001", "nearest is 1000"]),
    ({"model__image_token_id": 151_936}, ["model.image_token_id = 151936", "nearest is 151935"]),
    ({"model__image_token_id": 151_656}, ["must differ"]),
    ({"model__num_query_groups": 3}, ["model.num_query_groups = 3", "nearest is 2"]),
    ({"model__experts_per_token": 9}, ["model.experts_per_token = 9", "nearest is 8"]),
    ({"model__vision_heads": 3}, ["model.vision_heads = 3", "nearest is 2"]),
    ({"model__indexer_head_dim": 44}, ["model.indexer_head_dim = 44", "nearest: 48"]),
    ({"model__head_dim": 60}, ["model.head_dim = 60"]),
    ({"model__mrope_section": [8, 12, 13]}, ["model.mrope_section = [8, 12, 13]", "sum to 32"]),
    ({"model__attention_mode": "warmup"}, ["attention_mode = 'warmup'", "nearest is 'indexers'"]),
    ({"training__scope": "indexers"}, ["scope = 'indexers'", "nearest model.attention_mode is 'warmup'"]),
    ({"training__scope": "all"}, ["scope = 'all'", "nearest is 'all_but_indexers'"]),
    (
        {"model__attention_mode": "sparse", "training__scope": "all", "training__indexer_loss_weight": 0.0},
        ["training.indexer_loss_weight = 0"],
    ),
]


@pytest.mark.parametrize("world, changes, parts", LAYOUT_FAULTS + [(1, *fault) for fault in VALUE_FAULTS], ids=str)
def test_fault_is_one_line_that_helps(world, changes, parts):
    with pytest.raises(UserError) as caught:
        validate(recipe(**changes), world)
    lines = [line for line in str(caught.value).splitlines() if parts[0] in line]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError) as caught:
        validate(recipe(training__scope="al", optimizer__schedule="cos", optimizer__lr=-1.0), 1)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "installed, refused", [("0.16.1", True), ("0.18.2", True), ("0.19.2", False), ("0.19.0rc1", False)]
)
def test_unequal_expert_tensor_without_expert_parallelism(monkeypatch, installed, refused):
    monkeypatch.setattr(layout, "version", lambda name: installed)
    made = recipe(parallel__tensor=2)
    if not refused:
        assert validate(made, 2) == []
        return
    with pytest.raises(UserError, match=r"expert_tensor = 1 .*nearest is expert_tensor = 2 \(or expert = 2\)"):
        validate(made, 2)


def test_warnings():
    sparse = {"model__attention_mode": "sparse", "training__scope": "all"}
    assert validate(recipe(**sparse, model__topk=1023), 1) == []
    (line,) = validate(recipe(**sparse, model__topk=1024), 1)
    assert "model.topk = 1024" in line and "nothing sparse will happen" in line
    (line,) = validate(recipe(data__image__max_tokens=1025), 1)
    assert "data.image.max_tokens = 1025" in line
    (line,) = validate(recipe(training__stop_after=1001), 1)
    assert "training.stop_after" in line
