"""The language model in dense mode against transformers' Qwen3MoeForCausalLM (eager): logits, loss, every gradient.

Our side is the trainer's engine itself, on packed rows with padding, in several layouts; theirs sees each document alone.
Indexers are there and frozen: dense mode must not feel them. The balance loss is off here (test_balance_loss.py).
fp32, 4 layers. Errors are relative norms, tensor by tensor: measured at most 1.4e-6, from sums in another order; the bound
of 1e-5 is far below what one wrong expert, head or scale makes (the last test).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from launch import launch
from torch import Tensor

from megatron_keye.config.model import ModelConfig, build_config
from tests.megatron_keye.parity import qwen
from tests.megatron_keye.parity.compare import assert_near, error, generator
from tests.megatron_keye.parity.ranks import Result, join_gradients, join_logits, packed_rows, step

TOLERANCE = 1e-5
LAYOUTS = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2, "expert_tensor": 2}),
    "expert 2": (2, {"expert": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
    "context 2": (2, {"context": 2}),  # loss and gradients alone: no rank has whole rows of logits
}


def config() -> ModelConfig:
    return build_config("keye_mini", vocab_size=256, image_token_id=254, video_token_id=255)


@pytest.fixture(scope="module")
def theirs() -> dict:
    cfg = config()
    model = qwen.oracle(cfg)
    rows = packed_rows(cfg)
    samples = [sample for row in rows for sample in row]
    with torch.no_grad():
        logits = [qwen.document_logits(model, sample)[0] for sample in samples]
    loss = qwen.mean_loss(model, samples)
    loss.backward()
    weights = qwen.released(model) | indexers(cfg)
    return {
        "rows": rows,
        "weights": weights,
        "logits": logits,
        "loss": loss.item(),
        "gradients": qwen.released(model, lambda p: p.grad),
    }


def indexers(cfg: ModelConfig) -> dict[str, Tensor]:
    """Random weights of what Qwen does not have."""
    heads, dim, random = cfg.indexer_heads, cfg.indexer_head_dim, generator(5)
    shapes = {
        "q_proj.weight": (heads * dim + heads, cfg.hidden_size), "k_proj.weight": (dim, cfg.hidden_size),
        "q_norm.weight": (dim,), "k_norm.weight": (dim,), "k_norm.bias": (dim,),
    }  # fmt: skip
    return {
        f"model.layers.{layer}.self_attn.sa_indexer.{name}": torch.randn(shape, generator=random)
        for layer in range(cfg.num_layers)
        for name, shape in shapes.items()
    }


def ours(name: str, theirs: dict, weights: dict[str, Tensor] | None = None) -> list[Result]:
    size, layout = LAYOUTS[name]
    return launch(step, size, layout, config(), weights or theirs["weights"], theirs["rows"], 0.0)


def check(theirs: dict, results: list[Result]) -> None:
    assert all(result.loss == results[0].loss for result in results)
    assert results[0].loss == pytest.approx(theirs["loss"], rel=TOLERANCE)
    assert_near(join_gradients(results, config()), theirs["gradients"], TOLERANCE)


def check_logits(theirs: dict, results: list[Result]) -> None:
    logits, expected = join_logits(results), iter(theirs["logits"])
    for row, samples in enumerate(theirs["rows"]):
        begin = 0
        for sample in samples:
            assert error(logits[row, begin : begin + len(sample)], next(expected)) < TOLERANCE
            begin += len(sample)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_loss_and_every_gradient(name: str, theirs: dict):
    results = ours(name, theirs)
    check(theirs, results)
    if name != "context 2":
        check_logits(theirs, results)


def test_every_gradient_compared_is_there(theirs: dict):
    """Two zeros would pass as equal: an expert that no token chose would be such a case."""
    assert len(theirs["gradients"]) == 3 + config().num_layers * (9 + 3 * config().num_experts)
    assert all(gradient.norm() > 1e-3 for gradient in theirs["gradients"].values())  # measured 0.011 at least


MUTATIONS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "gate and up of one expert exchanged": lambda w: swap(
        w, "model.layers.2.mlp.experts.3.gate_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    ),
    "two experts exchanged": lambda w: swap(
        w, "model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.experts.5.down_proj.weight"
    ),
    "one norm weight off by a hundredth": lambda w: w["model.layers.3.self_attn.k_norm.weight"][7].mul_(1.01),
}


def swap(weights: dict[str, Tensor], a: str, b: str) -> None:
    weights[a], weights[b] = weights[b], weights[a]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(mutation: str, theirs: dict):
    weights = {name: tensor.clone() for name, tensor in theirs["weights"].items()}
    MUTATIONS[mutation](weights)
    results = ours("one process", theirs, weights)
    for comparison in (check, check_logits):
        with pytest.raises(AssertionError):
            comparison(theirs, results)
