"""What the coefficient of the router's balance loss means: here as in transformers.

Of one layer and a set R of rows, with E experts and K of them a token: f_e = share of tokens that chose e (they sum to K),
P_e = mean probability of e (they sum to 1). All sums below are over e.
    transformers:  H(R) = E * sum f_e P_e          K when all experts are used alike; gradients go through P only
    Megatron:      M(R) = E * sum (f_e / K) P_e    1 when all experts are used alike;   M = H / K
transformers gives H all layers at once, as if L layers were L times the tokens: f and P are then means over layers, and
    H(pooled) = mean over layers of H(layer)  -  E * sum cov_layers(f_e, P_e).
The covariance lets one layer's overload of expert 5 be cancelled by another layer's neglect of its expert 5, although the
two have nothing but their number in common. Megatron adds up the layers' own losses, row by row, and so do we:
    ours = coefficient * mean over layers and rows of H(layer, row), a row weighed by its tokens
which needs Megatron's own coefficient to be coefficient * K / L. With one layer and one row, or layers loaded alike, this is
transformers' loss exactly; else the covariance over layers (and rows) is the whole difference.
Tolerances: fp32, the gradients are differences of two steps' gradients, so 2e-5
(measured 3e-6).
"""

from __future__ import annotations

import pytest
import torch
from launch import launch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_keye.config.model import ModelConfig, build_config
from tests.megatron_keye.parity import qwen
from tests.megatron_keye.parity.compare import assert_near, error, generator
from tests.megatron_keye.parity.ranks import join_gradients, packed_rows, step
from tests.megatron_keye.parity.test_language import LAYOUTS, indexers

HEAVY = 1.0  # a thousand times the usual, so that the loss is well above the rounding of the rest


def config(layers: int = 4) -> ModelConfig:
    return build_config("keye_mini", vocab_size=256, image_token_id=254, video_token_id=255, num_layers=layers)


def hugging_face(cfg: ModelConfig, *gate_logits: Tensor) -> Tensor:
    return load_balancing_loss_func(gate_logits, cfg.num_experts, cfg.experts_per_token)


def layer_by_row(model, cfg: ModelConfig, rows: list) -> tuple[Tensor, Tensor]:
    """transformers' loss of each layer and row by itself [rows, L], and the tokens of each row."""
    losses = []
    for row in rows:
        documents = [qwen.document_logits(model, sample)[1] for sample in row]
        losses.append(torch.stack([hugging_face(cfg, torch.cat(layer)) for layer in zip(*documents)]))
    return torch.stack(losses), torch.tensor([sum(map(len, row)) for row in rows])


def our_gradients(cfg: ModelConfig, name: str, model, rows: list) -> tuple[dict[str, Tensor], float]:
    """Gradients of the balance loss alone, and its logged value."""
    size, layout = LAYOUTS[name]
    weights = qwen.released(model) | indexers(cfg)
    heavy, none = (launch(step, size, layout, cfg, weights, rows, coefficient) for coefficient in (HEAVY, 0.0))
    without = join_gradients(none, cfg)
    assert heavy[0].balance is not None
    return {n: g - without[n] for n, g in join_gradients(heavy, cfg).items()}, heavy[0].balance


@pytest.fixture(scope="module")
def four_layers() -> dict:
    cfg = config()
    model = qwen.oracle(cfg)
    rows = packed_rows(cfg)
    losses, tokens = layer_by_row(model, cfg, rows)
    (HEAVY * (losses.mean(1) * tokens).sum() / tokens.sum()).backward()
    gradients = qwen.released(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    return {"cfg": cfg, "model": model, "rows": rows, "losses": losses.detach(), "gradients": gradients}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ours_is_theirs_layer_by_layer_and_row_by_row(name: str, four_layers: dict):
    cfg = four_layers["cfg"]
    gradients, logged = our_gradients(cfg, name, four_layers["model"], four_layers["rows"])
    assert_near(gradients, four_layers["gradients"], 2e-5)  # exactly zero in both behind the last router
    # what is logged is 1 at perfect balance, and counts rows alike
    assert logged * cfg.experts_per_token == pytest.approx(float(four_layers["losses"].mean()), rel=1e-5)


def test_one_layer_and_one_row_is_transformers_loss_itself():
    """Their whole loss with their coefficient, against one step of ours with the same number."""
    cfg = config(layers=1)
    model = qwen.oracle(cfg)
    (sample, *_), *_ = packed_rows(cfg)
    ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)[None]
    model.router_aux_loss_coef = HEAVY
    model(ids, labels=labels, output_router_logits=True).loss.backward()
    results = launch(step, 1, {}, cfg, qwen.released(model) | indexers(cfg), [[sample]], HEAVY)
    assert_near(join_gradients(results, cfg), qwen.released(model, lambda p: p.grad), 1e-5)


def test_pooling_differs_by_a_covariance_between_layers():
    cfg = config()
    gates = [torch.randn(200, cfg.num_experts, generator=generator(i)) + 0.5 * i for i in range(cfg.num_layers)]
    gates[1][:, 3] += 2  # each layer loads another expert
    gates[2][:, 6] += 2
    probabilities = torch.stack([g.softmax(-1) for g in gates])
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(cfg.experts_per_token).indices, 1)
    f, p = chosen.mean(1), probabilities.mean(1)  # [L, E]
    covariance = ((f - f.mean(0)) * (p - p.mean(0))).mean(0).sum() * cfg.num_experts
    apart = torch.stack([hugging_face(cfg, g) for g in gates]).mean()
    torch.testing.assert_close(hugging_face(cfg, *gates), apart - covariance, rtol=1e-5, atol=0)
    assert covariance > 0.05 * apart  # so the two are not the same loss ...
    torch.testing.assert_close(
        hugging_face(cfg, gates[1], gates[1]), hugging_face(cfg, gates[1])
    )  # ... unless loaded alike


def test_the_value_at_perfect_balance():
    """Every expert is chosen equally often, and no logit stands out."""
    cfg = config()
    tokens = torch.arange(8 * cfg.num_experts)
    gates = torch.zeros(len(tokens), cfg.num_experts)
    for k in range(cfg.experts_per_token):
        gates[tokens, (tokens + k) % cfg.num_experts] = 1e-6
    assert float(hugging_face(cfg, gates)) == pytest.approx(cfg.experts_per_token, rel=1e-5)


def test_the_gradients_notice_pooling(four_layers: dict):
    """transformers' pooled loss on the same rows has other gradients, by far more than the tolerance."""
    cfg, model = four_layers["cfg"], four_layers["model"]
    documents = [qwen.document_logits(model, sample)[1] for row in four_layers["rows"] for sample in row]
    routers = {name: p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")}
    pooled = hugging_face(cfg, *(torch.cat(layer) for layer in zip(*documents)))
    for name, gradient in zip(routers, torch.autograd.grad(pooled, list(routers.values()))):
        assert error(gradient, four_layers["gradients"][name]) > 0.05
