"""The dry run against known counts, against the buffers that the trainer really makes, and against work done by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_keye.config.load import load_recipe
from megatron_keye.errors import UserError
from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.dry_run import dry_run, make_plan
from megatron_keye.planning.hardware import H200

ROOT = Path(__file__).resolve().parents[3]
STAGE1 = ROOT / "recipes" / "stage1.yaml"
KNOWN = {
    "language model": 30_532_122_624,
    "indexers": 108_536_832,
    "vision encoder": 450_735_984,
    "projector": 30_686_720,
}


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()  # those of tests before this one: a dry run makes a fake world of its own
    yield
    assert not dist.is_initialized()


def recipe(*overrides: str):
    return load_recipe(STAGE1, overrides)


@pytest.mark.parametrize(
    "world_size, layout",
    [
        (1, {"tensor": 1, "expert": 1}),
        (64, {"tensor": 4, "expert": 8, "pipeline": 4, "context": 2}),
        (48, {"tensor": 2, "expert": 4, "expert_tensor": 2, "pipeline": 3, "virtual_pipeline": 4}),
        (1024, {"tensor": 4, "expert": 32, "pipeline": 2, "context": 8}),
    ],
)
def test_whole_model_counts_in_every_layout(world_size, layout):
    chosen = recipe(*(f"parallel.{key}={size}" for key, size in layout.items()))
    plan = make_plan(chosen, world_size)
    assert plan["parameters"]["by_part"] == KNOWN
    assert plan["parameters"]["total"] == 31_122_082_160
    # of 128 experts of 3 x 2048 x 768 in each of 48 layers, 120 are idle
    assert plan["parameters"]["active_per_token"] == KNOWN["language model"] - 48 * 120 * 3 * 2048 * 768
    stages = plan["stages"]
    language = KNOWN["language model"] + KNOWN["indexers"]
    assert sum(s["language_parameters_of_all_ranks"] for s in stages) == language
    chunks = sorted(tuple(c) for s in stages for c in s["layers"])
    assert [i for first, last in chunks for i in range(first, last + 1)] == list(range(48))
    assert [s["rank"] for s in stages] == [i * world_size // len(stages) for i in range(len(stages))]
    for stage in stages:
        assert stage["parameters"]["vision encoder"] == KNOWN["vision encoder"]
        assert stage["parameters"]["indexers"] * len(stages) == KNOWN["indexers"]


def test_one_rank_by_hand():
    """Middle stage of 4, tensor 4, experts over 8: 12 layers of the released shapes."""
    plan = make_plan(recipe("parallel.tensor=4", "parallel.expert=8", "parallel.pipeline=4"), 128)
    attention = (2048 * (4096 + 2 * 512) + 4096 * 2048) // 4 + 2 * 128
    experts = 128 // 8 * 3 * 2048 * 768
    stage = plan["stages"][1]
    assert stage["parameters"]["language model"] == 12 * (attention + experts + 2048 * 128 + 2 * 2048)
    assert plan["stages"][0]["parameters"]["language model"] == (
        stage["parameters"]["language model"] + 151_936 // 4 * 2048
    )
    assert stage["bytes"]["weights"] == 2 * sum(stage["parameters"].values())
    assert stage["bytes"]["gradients"] == 4 * sum(stage["trained"].values())
    dense, tower = 12 * (attention + 2048 * 128 + 2 * 2048), stage["trained"]["vision encoder"] + KNOWN["projector"]
    # 128 ranks / 4 stages: dense weights on 32 / 4 data ranks, experts on 32 / 8, the tower on all
    expected = 12 * (dense / 8 + 12 * experts / 4 + tower / 128)
    assert stage["bytes"]["optimizer"] == pytest.approx(expected, abs=3)


@pytest.mark.parametrize(
    "scope, mode, trained",
    [
        ("all_but_indexers", "dense", {"language model", "vision encoder", "projector"}),
        ("projector", "dense", {"projector"}),
        ("indexers", "warmup", {"indexers"}),
        ("all", "sparse", {"language model", "indexers", "vision encoder", "projector"}),
    ],
)
def test_scope_decides_what_has_gradients_and_states(scope, mode, trained):
    overrides = (f"training.scope={scope}", f"model.attention_mode={mode}")
    plan = make_plan(recipe("profile=mini", *overrides), 1)
    counts = plan["parameters"]
    assert {part for part, count in counts["trained"].items() if count} == trained
    for part in trained - {"vision encoder"}:
        assert counts["trained"][part] == counts["by_part"][part]
    # 64 unused positions of width 64 are carried along and never trained
    if "vision encoder" in trained:
        assert counts["by_part"]["vision encoder"] - counts["trained"]["vision encoder"] == 64 * 64
    size = sum(counts["trained"].values())
    assert plan["stages"][0]["bytes"]["gradients"] == 4 * size
    assert plan["stages"][0]["bytes"]["optimizer"] == 8 * size  # fp32 weights are their own masters


@pytest.mark.parametrize("grouped", ["false", "true"], ids=["experts in turn", "grouped experts"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "world_size, layout", [(8, ["tensor=2", "expert=4"]), (16, ["tensor=2", "expert=2", "pipeline=2", "context=2"])]
)
def test_bytes_are_those_of_the_trainers_buffers(precision, world_size, layout, grouped):
    """Megatron's own gradient buffers and optimizer shards of a rank of each stage, made in a fake world of that size."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_keye.parallel import plan as parallel_plan
    from megatron_keye.training.engine import Engine

    kind = (f"training.precision={precision}", f"model.grouped_experts={grouped}")
    chosen = recipe("profile=mini", *kind, *(f"parallel.{x}" for x in layout))
    for stage in make_plan(chosen, world_size)["stages"]:
        dist.init_process_group("fake", store=FakeStore(), rank=stage["rank"], world_size=world_size)
        try:
            groups = parallel_plan.initialize(chosen.parallel)
            engine = Engine(chosen, groups, resume_from=Path("weights are not needed"))
            models = [*engine.language_ddp, engine.tower_ddp]
            weights = [p for model in models for p in model.parameters()]
            buffers = [b.grad_data for model in models for b in [*model.buffers, *model.expert_parallel_buffers]]
            owned = [
                p for o in engine.optimizer.chained_optimizers for g in o.optimizer.param_groups for p in g["params"]
            ]
        finally:
            parallel_plan.shut_down()
        assert all(t.dtype is torch.float32 for t in buffers + owned)
        per_element = 8 if precision == "fp32" else 12
        assert stage["bytes"]["weights"] == sum(p.numel() * p.element_size() for p in weights)
        # the buffers are padded, by less than a kilobyte each
        gradients = sum(b.numel() * 4 for b in buffers)
        assert 0 <= gradients - stage["bytes"]["gradients"] < 1024 * len(buffers)
        states = sum(p.numel() * per_element for p in owned)
        assert abs(states - stage["bytes"]["optimizer"]) < 1024 * len(buffers)


TINY_MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "head_dim": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_ffn_hidden_size": 3,
    "vocab_size": 10,
    "indexer_heads": 2,
    "indexer_head_dim": 16,
    "topk": 2,
    "image_token_id": 1,
    "video_token_id": 2,
    "vision_layers": 1,
    "vision_hidden_size": 8,
    "vision_heads": 1,
    "vision_ffn_hidden_size": 16,
}
TINY = [
    "profile=mini",
    *(f"model.{key}={value}" for key, value in TINY_MODEL.items()),
    "data.seq_length=4",
    "data.video.max_frame_tokens=1",
    "training.global_batch_size=6",
]


@pytest.mark.parametrize(
    "mode, scope, forward",
    [
        # 4 tokens x 2 x (projections 8 * (2*32 + 2*16) + experts 2 * 3*8*3 + router 8*4) = 7552, head 2 * 3 * 8*10 = 480,
        # attention 4 * 32 a pair: 10 pairs, or 1 + 2 + 2 + 2 selected
        ("dense", "all_but_indexers", 7552 + 480 + 1280),
        # indexer: 4 tokens x 2 x 8 * (2*17 + 16) = 3200, scores 2 * 2*16 a pair = 640
        ("warmup", "indexers", 7552 + 480 + 1280 + 3200 + 640),
        ("sparse", "all", 7552 + 480 + 896 + 3200 + 640),
    ],
)
def test_flops_by_hand(mode, scope, forward):
    chosen = recipe(*TINY, f"model.attention_mode={mode}", f"training.scope={scope}")
    flops = dry_run(chosen, 2, machine=None)["flops"]
    assert flops["per_step"] == {"dense_equivalent": 6 * 3 * 9312, "actual": 6 * 3 * forward}
    assert flops["per_step_and_rank"] == {"dense_equivalent": 3 * 3 * 9312, "actual": 3 * 3 * forward}
    # 4 patches: embedding 2 * 3*196*8 and matrices 2 * (4*64 + 2*8*16) each, attention 4 * 8 * 16, projector 2 * (32*32 + 32*8)
    assert flops["largest_frame"] == {"tokens": 1, "flops": 3 * (4 * 9408 + 4 * 1024 + 512 + 2560)}


def test_command_line_needs_no_gpu_and_no_data(tmp_path):
    written = tmp_path / "plans" / "stage1.json"
    drawn = tmp_path / "plans" / "stage1.png"
    command = [
        "recipes/stage1.yaml",
        "--dry-run",
        "--world-size",
        "256",
        "--json",
        str(written),
        "--picture",
        str(drawn),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ".:kernels:data_pipeline"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_keye.train", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "31,122,082,160",
        "64 data",
        "32 expert-data",
        "Not estimated",
        "activations",
        "tokens/s/GPU",
        "allgather",
    ):
        assert text in done.stdout
    assert json.loads(written.read_text()) == json.loads(json.dumps(make_plan(recipe(), 256, H200)))
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_deepep_is_planned_without_its_package():
    """As the plain exchange of tokens that it stands in for."""
    plain, flex = (
        make_plan(recipe("profile=mini", "parallel.expert=2", f"parallel.dispatcher={name}"), 2, H200)
        for name in ("alltoall", "flex")
    )
    assert flex["step"] == plain["step"] and flex["stages"] == plain["stages"]


def test_impossible_layout_names_the_nearest():
    with pytest.raises(UserError, match=r"parallel.tensor = 3 .* the nearest is"):
        dry_run(recipe("parallel.tensor=3"), 24)


def test_what_megatron_refuses_is_one_clear_error():
    """Past the checks of the recipe, straight to the modules."""
    with pytest.raises(UserError, match=r"cannot build pipeline stage 0 .*divisible"):
        make_plan(recipe("profile=mini", "model.num_layers=3", "parallel.pipeline=2"), 2)


def test_refuses_a_process_with_groups():
    from megatron_keye.parallel import plan as parallel_plan

    parallel_plan.single_process()
    try:
        with pytest.raises(UserError, match="already has process groups"):
            dry_run(recipe("profile=mini"), 1)
        assert dist.is_initialized()  # not ours to end
    finally:
        parallel_plan.shut_down()


def test_json_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--json .*plan.json: cannot be written"):
        dry_run(recipe("profile=mini"), 1, tmp_path / "file" / "plan.json", machine=None)


def test_picture_that_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match=r"--picture .*plan.jpx: cannot be written"):
        dry_run(recipe("profile=mini"), 1, None, tmp_path / "plan.jpx", machine=None)
