"""Released tensor names against this stack's parameters: one table, read by initialisation, import, export and verify.

A parameter of ours stands for one or more released tensors (`Link.released`), joined and split without arithmetic. Names
are those of the per-expert layout; the fused layout is a view of it (checkpoint files: hf_files.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as ps
from torch import nn

from megatron_keye.config.model import ModelConfig
from megatron_keye.errors import UserError

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Link:
    """How one whole (unsharded) parameter of ours is made of released tensors."""

    released: tuple[str, ...]
    join: Callable[[Tensors], torch.Tensor]
    split: Callable[[torch.Tensor], Tensors]
    shard: str = "none"  # none | rows | columns | gated: what tensor parallelism cuts


def _one(name: str, shard: str = "none") -> Link:
    return Link((name,), lambda t: t[0], lambda p: (p,), shard)


def _rows(names: tuple[str, ...], shard: str = "rows") -> Link:
    return Link(names, lambda t: torch.cat(list(t)), lambda p: p.chunk(len(names)), shard)


def _qkv_by_group(names: tuple[str, ...], heads: int, groups: int, dim: int, shard: str = "none") -> Link:
    """Megatron keeps, group by group: the group's query heads, its key head, its value head."""
    per_group = heads // groups

    def join(tensors: Tensors) -> torch.Tensor:
        parts = [t.reshape(groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(p: torch.Tensor) -> Tensors:
        by_group = p.reshape(groups, -1, *p.shape[1:])
        sizes = [per_group * dim, dim, dim]
        return tuple(part.flatten(0, 1) for part in by_group.split(sizes, dim=1))

    return Link(names, join, split, shard)


def language_link(name: str, cfg: ModelConfig) -> Link:
    """The link of a language-model parameter; `name` counts layers and experts globally."""
    top = {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "rows"),
        "output_layer.weight": ("lm_head.weight", "rows"),
        "decoder.final_layernorm.weight": ("model.norm.weight", "none"),
    }
    if name in top:
        return _one(*top[name])
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    base, rest = f"model.layers.{match[1]}.", match[2]
    if rest == "self_attention.linear_qkv.weight":
        names = tuple(f"{base}self_attn.{x}_proj.weight" for x in "qkv")
        return _qkv_by_group(names, cfg.num_attention_heads, cfg.num_query_groups, cfg.head_dim, "rows")
    expert = re.fullmatch(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)", rest)
    if expert:
        mlp = f"{base}mlp.experts.{expert[1] or expert[3]}."
        if expert[2] == "1":
            return _rows((f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "gated")
        return _one(f"{mlp}down_proj.weight", "columns")
    if rest.startswith("self_attention.indexer."):
        return _one(base + rest.replace("self_attention.indexer", "self_attn.sa_indexer"))
    simple = {
        "input_layernorm.weight": ("input_layernorm.weight", "none"),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "none"),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "columns"),
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", "none"),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", "none"),
        "mlp.router.weight": ("mlp.gate.weight", "none"),
    }
    released, shard = simple[rest]
    return _one(base + released, shard)


def vision_link(name: str, cfg: ModelConfig) -> Link:
    """The link of a vision-tower parameter."""
    if name.startswith("projector."):
        return _one(name.replace("projector.", "mlp_AR."))
    base = "visual.vision_model."
    name = name.removeprefix("vision_model.")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        if name.startswith("encoder.final_layernorm."):
            return _one(base + name.replace("encoder.final_layernorm", "post_layernorm"))
        return _one(f"{base}embeddings.{name}")
    layer, rest = f"{base}encoder.layers.{match[1]}.", match[2]
    if rest.startswith("self_attention.linear_qkv."):
        names = tuple(f"{layer}self_attn.{x}_proj.{rest.rsplit('.', 1)[1]}" for x in "qkv")
        heads = cfg.vision_heads
        return _qkv_by_group(names, heads, heads, cfg.vision_hidden_size // heads)
    for ours, released in (
        ("input_layernorm", "layer_norm1"),
        ("pre_mlp_layernorm", "layer_norm2"),
        ("self_attention.linear_proj", "self_attn.out_proj"),
        ("mlp.linear_fc1", "mlp.fc1"),
        ("mlp.linear_fc2", "mlp.fc2"),
    ):
        if rest.startswith(ours):
            return _one(layer + rest.replace(ours, released))
    raise KeyError(name)


def links(module: nn.Module, cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor, Link]]:
    """Every parameter of a LanguageModel stage or a VisionTower on this rank, with its link; grouped experts one by one."""
    is_language = hasattr(module, "decoder")
    for whole_name, whole in module.named_parameters():
        if not is_language:
            yield whole_name, whole, vision_link(whole_name, cfg)
            continue
        for name, parameter in _one_by_one(whole_name, whole):
            yield name, parameter, language_link(global_name(name, module, cfg), cfg)


def _one_by_one(name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A stack of experts' weights under the names that they have as modules of their own; anything else as it is."""
    grouped = re.fullmatch(r"(.*mlp\.experts\.)(linear_fc[12]\.weight)", name)
    if grouped is None:
        yield name, parameter
        return
    for i, one in enumerate(parameter.detach()):
        yield f"{grouped[1]}local_experts.{i}.{grouped[2]}", one


def global_name(name: str, module: nn.Module, cfg: ModelConfig) -> str:
    """Local layer and expert numbers -> the model's own."""

    def layer(match: re.Match) -> str:
        return f"decoder.layers.{module.decoder.layers[int(match[1])].layer_number - 1}"  # type: ignore[union-attr,index]

    first_expert = ps.get_expert_model_parallel_rank() * (cfg.num_experts // ps.get_expert_model_parallel_world_size())
    name = re.sub(r"decoder\.layers\.(\d+)", layer, name)
    name = re.sub(r"(?<=local_experts\.)(\d+)", lambda m: str(int(m[1]) + first_expert), name)
    return re.sub(r"(?<=experts\.linear_fc[12]\.weight)(\d+)", lambda m: str(int(m[1]) + first_expert), name)


def local_shard(whole: torch.Tensor, link: Link, is_expert: bool) -> torch.Tensor:
    """This tensor-parallel rank's part of a whole parameter."""
    if is_expert:
        rank, size = ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()
    else:
        rank, size = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    if size == 1 or link.shard == "none":
        return whole
    if link.shard == "gated":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=0 if link.shard == "rows" else 1)[rank]


def released_shapes(link: Link, local_shape: torch.Size, is_expert: bool) -> list[torch.Size]:
    """Shapes of the released tensors behind a parameter, of which this tensor-parallel rank holds `local_shape`."""
    size = ps.get_expert_tensor_parallel_world_size() if is_expert else ps.get_tensor_model_parallel_world_size()
    shape = list(local_shape)
    if link.shard != "none":
        shape[1 if link.shard == "columns" else 0] *= size
    return [t.shape for t in link.split(torch.empty(shape, device="meta"))]


@torch.no_grad()
def load_released(module: nn.Module, cfg: ModelConfig, read: Callable[[str], torch.Tensor]) -> None:
    """Fill this rank's parameters; `read(name)` gives a whole released tensor. UserError where its shape is another."""
    for name, parameter, link in links(module, cfg):
        is_expert = ".experts." in name
        pieces = [read(released) for released in link.released]
        for released, piece, shape in zip(link.released, pieces, released_shapes(link, parameter.shape, is_expert)):
            if piece.shape != shape:
                raise UserError(f"{released} is {list(piece.shape)} and must be {list(shape)} for this configuration")
        parameter.copy_(local_shard(link.join(pieces), link, is_expert))


@torch.no_grad()
def released_tensors(module: nn.Module, cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(released name, tensor) of an unsharded module."""
    for _, parameter, link in links(module, cfg):
        yield from zip(link.released, link.split(parameter.detach()))
