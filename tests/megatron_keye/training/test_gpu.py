"""Every recipe's mini profile on one GPU: five steps, equal to the CPU's torch path in fp32; bf16 and DALI on H.264.

`make test-gpu`. Where there is no CUDA device these skip and say so; the comparison itself is rehearsed on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_runs import REPOSITORY, command, finish, metrics, start

from keye_data.shards import build_shards
from keye_data.synthetic import generate

RECIPES = sorted(file.stem for file in (REPOSITORY / "recipes").glob("*.yaml") if file.stem != "curriculum")
STEPS = ("training.steps=5", "checkpoint.interval=null", "logging.plot=false")
FP32, BF16 = ("training.precision=fp32",), ("training.precision=bf16",)

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: run `make test-gpu` on a machine with one"
    ),
]


@pytest.fixture(scope="session")
def h264_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h264")
    generate(folder / "source", 120, codec="h264", size=112)
    build_shards(folder / "source", folder / "shards", samples_per_shard=40)
    return folder / "shards"


def train(run_dir: Path, shards: Path, tiktoken: Path, recipe: str, *overrides: str) -> list[dict]:
    words = command(run_dir, shards, tiktoken, *STEPS, *overrides, recipe=recipe)
    code, text = finish(start(words))
    assert code == 0, text
    return metrics(run_dir)


def assert_alike(expected: list[dict], got: list[dict], relative: float) -> None:
    assert len(got) == len(expected) == 5
    for a, b in zip(expected, got):
        assert b["sample-keys"] == a["sample-keys"]
        for key in ("lm loss", "grad-norm", "indexer loss", "load_balancing_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=relative), f"{key} of step {a['iteration']}"


@pytest.mark.parametrize("recipe", RECIPES)
class TestOnOneGpu:
    pytestmark = gpu

    def test_fp32_equals_the_cpu(
        self, recipe: str, clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path, monkeypatch
    ):
        on_gpu = train(tmp_path / "gpu", clip_shards, qwen_tiktoken, recipe, *FP32, "model.attention_backend=triton")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        on_cpu = train(tmp_path / "cpu", clip_shards, qwen_tiktoken, recipe, *FP32, "model.attention_backend=torch")
        assert_alike(on_cpu, on_gpu, 1e-4)

    def test_bf16_with_dali(self, recipe: str, h264_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
        decoder = ("data.video.backend=dali", "data.video.device=gpu")
        rows = train(tmp_path / "run", h264_shards, qwen_tiktoken, recipe, *BF16, *decoder)
        assert all(row["grad-norm"] is not None for row in rows), "a step was skipped: something was not finite"
        assert sum(row["skipped-samples"] for row in rows) == 0
        exact = train(tmp_path / "fp32", h264_shards, qwen_tiktoken, recipe, *FP32)  # decoded by PyAV
        assert rows[0]["lm loss"] == pytest.approx(exact[0]["lm loss"], rel=1e-2)


@pytest.mark.slow  # two runs
def test_the_comparison_holds_two_backends_alike_and_can_fail(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    runs = [
        train(tmp_path / name, clip_shards, qwen_tiktoken, "dsa_sparse", *FP32, f"model.attention_backend={name}")
        for name in ("torch", "reference")
    ]
    assert_alike(*runs, 1e-4)
    other = [{**row, "lm loss": row["lm loss"] * (1 + 3e-4)} for row in runs[1]]
    with pytest.raises(AssertionError, match="lm loss of step 1"):
        assert_alike(runs[0], other, 1e-4)
