"""Layers of Transformer Engine against Megatron's own: the same parameters and checkpoint keys, norms left unfused.

The library itself runs nowhere here: a stand-in with its names and plain torch inside takes its place, so this is about
structure. What Transformer Engine computes is unverified.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invariance import assert_same
from launch import launch

from tests.megatron_keye.model.te_run import survey

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def with_te(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("te") / "survey"
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "data_pipeline", "tests/parallel"))
    script = Path(__file__).with_name("te_run.py")
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, out], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    return launch(survey, 1)[0]


def test_layers_are_transformer_engines_and_norms_stand_apart(with_te: dict, local: dict):
    """A norm fused into the projection behind it would hide the normalised hidden states from the indexer."""
    assert with_te["classes"] == {
        "input norm": "RMSNorm",
        "qkv": "TEColumnParallelLinear",
        "q norm": "RMSNorm",
        "proj": "TERowParallelLinear",
        "norm before experts": "RMSNorm",
        "experts": "TEGroupedMLP",
        "final norm": "RMSNorm",
    }
    assert local["classes"]["qkv"] == "ColumnParallelLinear" and local["classes"]["experts"] == "SequentialMLP"


def test_checkpoints_have_the_same_keys(with_te: dict, local: dict):
    assert with_te["keys"] == local["keys"]
    assert any(key.endswith("pre_mlp_layernorm.weight") for key, *_ in local["keys"])


def test_they_train_alike(with_te: dict, local: dict):
    """The released names, too: weights are drawn and compared by them."""
    assert_same(local["run"], with_te["run"])


def test_what_is_printed(with_te: dict, local: dict):
    assert local["described"] == "Megatron-Core's local layers; norm megatron_keye RMSNorm; optimizer torch AdamW"
    assert with_te["described"] == "Transformer Engine (unverified); norm megatron TENorm; optimizer torch AdamW"
