"""Keye-VL-2.0's attention, from its definition: 3-axis rotary positions, the lightning indexer, the top-k, the softmax.

Eager and readable. Queries are taken in chunks, so that without gradients memory grows with chunk x keys, never with
queries x keys. Shapes: B rows, T new tokens, S keys (cached and new), H query heads in G groups, D wide; Hi index heads,
Di wide; C queries of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .configuration_keye_vl2 import KeyeVL2Config

Angles = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """In fp32, whatever the weights are."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def rotary_angles(position_ids: Tensor, dim: int, sections: list[int], rope: dict[str, Any]) -> Tensor:
    """Position ids [3, B, T] of (t, h, w) -> angles [B, T, dim / 2] in fp32; `sections`: frequencies of each axis."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
    axes = position_ids.float()[..., None] * (1.0 / rope["rope_theta"] ** exponents)  # [3, B, T, dim / 2]
    if not rope["mrope_interleaved"]:  # ttt... hhh... www...
        return torch.cat([axes[i].split(sections, -1)[i] for i in range(3)], dim=-1)
    angles = axes[0].clone()  # thwthw... and t alone once h and w have used up theirs
    for i in (1, 2):
        angles[..., i : 3 * sections[i] : 3] = axes[i][..., i : 3 * sections[i] : 3]
    return angles


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate-half of x [..., heads, D] by angles [..., D / 2], in fp32."""
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class LightningIndexer(nn.Module):
    """Scores every key for every query with small heads: the rows of `q_proj` are the query, then one gate a head.

    The Hadamard turn that serving applies to q and k is orthonormal: without quantisation it cancels, and is left out.
    """

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.heads, self.dim = config.sa_config["indexer_num_heads"], config.sa_config["indexer_head_dim"]
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim + self.heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.q_norm = RMSNorm(self.dim, eps=1e-6)
        self.k_norm = LayerNorm(self.dim, eps=1e-6)

    def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden], what feeds q, k and v -> q [B, T, Hi, Di], k [B, T, Di], gate [B, T, Hi]"""
        q, gate = self.q_proj(x.detach()).split([self.heads * self.dim, self.heads], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.heads, self.dim)))
        k = self.k_norm(self.k_proj(x.detach()))
        return rotate(q, angles), rotate(k[..., None, :], angles).squeeze(-2), gate


@torch.no_grad()
def select_keys(q: Tensor, k: Tensor, gate: Tensor, visible: Tensor, topk: int) -> Tensor:
    """The `topk` visible keys of greatest score, of equal ones the earlier: bool [C, S]. All, where fewer are visible.

    q [C, Hi, Di], k [S, Di], gate [C, Hi], visible bool [C, S]; score = Di**-0.5 * sum_h gate_h * relu(q_h . k), in fp32.
    """
    score = torch.zeros(visible.shape, device=q.device)
    for head in range(q.shape[1]):
        score += gate[:, head, None].float() * (q[:, head].float() @ k.float().T).relu()
    score = score * q.shape[-1] ** -0.5 + 0.0  # a negative gate makes -0.0, which is no less than 0.0
    best = score.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    return torch.zeros_like(visible).scatter(1, best, True) & visible


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [C, H, D], k and v [S, G, D], allowed bool [C, S], the same for every head -> [C, H * D]; no key, no output."""
    outputs = []
    for heads, keys, values in zip(q.float().chunk(k.shape[1], dim=1), k.float().unbind(1), v.float().unbind(1)):
        logits = torch.einsum("chd,sd->chs", heads, keys) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
        outputs.append(torch.einsum("chs,sd->chd", logits.softmax(-1), values))
    out = torch.cat(outputs, dim=1).flatten(1) * allowed.any(-1, keepdim=True)
    return out.to(q.dtype)


class KeyeVL2Attention(nn.Module):
    def __init__(self, config: KeyeVL2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.sa_indexer = LightningIndexer(config)

    def forward(self, x: Tensor, angles: Angles, is_token: Tensor, cache: DynamicCache | None) -> Tensor:
        """x [B, T, hidden] normalised, angles for heads and for the indexer, is_token bool [B, S] -> [B, T, hidden]"""
        dim, sparse = self.config.head_dim, self.config.attention_mode == "sparse"
        q, k, v = (proj(x).unflatten(-1, (-1, dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), angles[0]), rotate(self.k_norm(k), angles[0])
        index = self.sa_indexer(x, angles[1]) if sparse else None
        if cache is not None:
            k, v = (y.transpose(1, 2) for y in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer))
            if index is not None:
                index = (index[0], cache.update_indexer(index[1], self.layer), index[2])
        rows = [self._row(b, q, k, v, index, is_token) for b in range(len(x))]
        return self.o_proj(torch.stack(rows))

    def _row(self, b: int, q: Tensor, k: Tensor, v: Tensor, index: Any, is_token: Tensor) -> Tensor:
        """One row of the batch -> [T, H * D]"""
        past, chunks = k.shape[1] - q.shape[1], []
        for queries in torch.arange(q.shape[1], device=q.device).split(self.config.sa_config["q_chunk_size"]):
            end = past + int(queries[-1]) + 1  # no query of this chunk sees a later key
            allowed = (torch.arange(end, device=q.device) <= past + queries[:, None]) & is_token[b, :end]
            if index is not None:
                iq, ik, gate = index
                topk = self.config.sa_config["topk"]
                allowed = select_keys(iq[b, queries], ik[b, :end], gate[b, queries], allowed, topk)
            chunks.append(attend(q[b, queries], k[b, :end], v[b, :end], allowed))
        return torch.cat(chunks)
