"""Vision encoder, projector, indexer and sparse attention against the formulas written out in plain torch.

The formulas read released tensors by their released names, so the mapping of names is under test as well.
fp32; 1e-5 absolute on outputs of order one: sums of some hundred terms in another order.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import megatron_keye.model as m
from megatron_keye.model.names import released_tensors
from megatron_keye.model.positions import axis_of_frequency

GRID = torch.tensor([[4, 6], [2, 2], [4, 6], [6, 2]])


@pytest.fixture(scope="module")
def model() -> m.KeyeModel:
    cfg = m.build_config(
        "keye_mini", attention_mode="sparse", vocab_size=128, image_token_id=126, video_token_id=127, topk=5
    )
    model = m.build_model(cfg, seed=7).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms and biases that are not ones and zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.mul_(4)
    return model


def weights(model: m.KeyeModel) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for module in (model.language_model, model.visual)
        for name, tensor in released_tensors(module, model.cfg)
    }


def linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def rotate_half(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x [..., D], angle [..., D / 2]"""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def frame_by_definition(w: dict[str, torch.Tensor], cfg: m.ModelConfig, patches: torch.Tensor, h: int, width: int):
    """One frame [h * width, 3, 14, 14] -> features [h * width, hidden]"""
    base, heads, hidden = "visual.vision_model", cfg.vision_heads, cfg.vision_hidden_size
    dim = hidden // heads
    x = F.conv2d(
        patches, w[f"{base}.embeddings.patch_embedding.weight"], w[f"{base}.embeddings.patch_embedding.bias"]
    ).flatten(1)
    table = w[f"{base}.embeddings.position_embedding.weight"].view(27, 27, hidden).permute(2, 0, 1)[None]
    x = x + F.interpolate(table, (h, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).flatten(0, 1)
    inverse = 10_000.0 ** (-torch.arange(dim // 4) * 4 / dim)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(width), indexing="ij")
    angle = torch.cat([row.flatten()[:, None] * inverse, column.flatten()[:, None] * inverse], -1)[:, None]
    for i in range(cfg.vision_layers):
        layer = f"{base}.encoder.layers.{i}"
        y = layer_norm(w, f"{layer}.layer_norm1", x, 1e-6)
        q, k, v = (linear(w, f"{layer}.self_attn.{n}_proj", y).view(-1, heads, dim) for n in "qkv")
        q, k = rotate_half(q, angle), rotate_half(k, angle)
        p = (torch.einsum("thd,shd->hts", q, k) * dim**-0.5).softmax(-1)
        x = x + linear(w, f"{layer}.self_attn.out_proj", torch.einsum("hts,shd->thd", p, v).flatten(1))
        y = layer_norm(w, f"{layer}.layer_norm2", x, 1e-6)
        x = x + linear(w, f"{layer}.mlp.fc2", F.gelu(linear(w, f"{layer}.mlp.fc1", y), approximate="tanh"))
    return layer_norm(w, f"{base}.post_layernorm", x, 1e-6)


def project_by_definition(w: dict[str, torch.Tensor], features: torch.Tensor, h: int, width: int) -> torch.Tensor:
    tokens = [
        torch.cat([features[(r + dr) * width + c + dc] for dr in (0, 1) for dc in (0, 1)])
        for r in range(0, h, 2)
        for c in range(0, width, 2)
    ]
    x = layer_norm(w, "mlp_AR.pre_norm", torch.stack(tokens), 1e-5)
    return linear(w, "mlp_AR.linear_2", F.gelu(linear(w, "mlp_AR.linear_1", x)))


@torch.no_grad()
def test_vision_tower(model: m.KeyeModel):
    """Frames of several sizes in one call, each as if it were alone."""
    w = weights(model)
    patches = torch.randn(int(GRID.prod(-1).sum()), 3, 14, 14, generator=torch.Generator().manual_seed(1))
    got = model.visual(patches, GRID).split((GRID.prod(-1) // 4).tolist())
    for pixels, (h, width), tokens in zip(patches.split(GRID.prod(-1).tolist()), GRID.tolist(), got):
        expected = project_by_definition(w, frame_by_definition(w, model.cfg, pixels, h, width), h, width)
        torch.testing.assert_close(tokens, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def angles(cfg: m.ModelConfig, ids: torch.Tensor, dim: int, sections: list[int]) -> torch.Tensor:
    """ids [3, T] -> [T, dim / 2]: first the frequencies of t, then of h, then of w"""
    parts, first = [], 0
    for axis, n in enumerate(sections):
        inverse = cfg.rope_theta ** (-2.0 * torch.arange(first, first + n) / dim)
        parts.append(ids[axis][:, None] * inverse)
        first += n
    return torch.cat(parts, -1)


def attention_by_definition(w: dict[str, torch.Tensor], cfg: m.ModelConfig, x: torch.Tensor, ids: torch.Tensor):
    """The first layer's sparse attention on normalised hidden states [T, hidden] -> [T, hidden]"""
    base, T = "model.layers.0.self_attn", len(x)
    q, k, v = (linear(w, f"{base}.{n}_proj", x).view(T, -1, cfg.head_dim) for n in "qkv")
    angle = angles(cfg, ids, cfg.head_dim, [8, 12, 12])[:, None]
    q = rotate_half(rms_norm(q, w[f"{base}.q_norm.weight"]), angle)
    k = rotate_half(rms_norm(k, w[f"{base}.k_norm.weight"]), angle)
    heads, dim = cfg.indexer_heads, cfg.indexer_head_dim
    qw = linear(w, f"{base}.sa_indexer.q_proj", x)
    iq, gate = qw[:, : heads * dim].view(T, heads, dim), qw[:, heads * dim :]
    ik = layer_norm(w, f"{base}.sa_indexer.k_norm", linear(w, f"{base}.sa_indexer.k_proj", x), 1e-6)
    angle = angles(cfg, ids, dim, [4, 6, 6])
    iq = rotate_half(rms_norm(iq, w[f"{base}.sa_indexer.q_norm.weight"]), angle[:, None])
    ik = rotate_half(ik, angle)
    score = torch.einsum("th,ths->ts", gate, torch.einsum("thd,sd->ths", iq, ik).relu()) * dim**-0.5
    out = []
    per_group = cfg.num_attention_heads // cfg.num_query_groups
    for t in range(T):
        chosen = sorted(range(t + 1), key=lambda s: (-float(score[t, s]), s))[: cfg.topk]
        for head in range(cfg.num_attention_heads):
            keys, values = k[chosen, head // per_group], v[chosen, head // per_group]
            out.append((keys @ q[t, head] * cfg.head_dim**-0.5).softmax(-1) @ values)
    return linear(w, f"{base}.o_proj", torch.stack(out).view(T, -1))


@torch.no_grad()
def test_sparse_attention_with_the_indexer(model: m.KeyeModel):
    from megatron_keye.model.positions import rotary_angles

    cfg, T = model.cfg, 24
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, cfg.hidden_size, generator=generator)
    ids = torch.randint(0, 40, (3, T), generator=generator)
    stop = torch.arange(1, T + 1, dtype=torch.int32)[None]
    attention = model.language_model.decoder.layers[0].self_attention
    got, _ = attention(
        x[:, None], torch.stack([torch.zeros_like(stop), stop]), rotary_pos_emb=rotary_angles(cfg, ids[:, None])
    )
    expected = attention_by_definition(weights(model), cfg, x, ids)
    torch.testing.assert_close(got[:, 0], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_axis_of_each_frequency():
    assert axis_of_frequency([2, 1, 1], "chunked") == [0, 0, 1, 2]
    assert axis_of_frequency([4, 2, 2], "interleaved") == [0, 1, 2, 0, 1, 2, 0, 0]
