"""The weights of a sharded model by released name, whole, in one process.

whole_weights(engine)     # on every rank; rank 0 gets {name: tensor}, the others {}
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from megatron_keye.model.names import global_name, language_link, released_tensors
from megatron_keye.training.engine import Engine


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Collective. Parts that several ranks hold must be equal to the last bit."""
    cfg = engine.recipe.model
    mine: dict[str, tuple[int, Tensor]] = {}
    for stage in engine.language:
        for name, parameter in stage.named_parameters():
            expert = ".experts." in name
            rank = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
            mine[global_name(name, stage, cfg)] = rank, parameter.detach().clone()  # alone, not with its whole buffer
    tower = {name: tensor.clone() for name, tensor in released_tensors(engine.tower, cfg)}
    bits = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in tower.values()))
    everyone: list = [None] * dist.get_world_size()
    dist.gather_object((mine, bits), everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return {}
    assert {its_bits for _, its_bits in everyone} == {bits}, "the ranks' vision towers differ"
    return {**tower, **join_language([part for part, _ in everyone], cfg)}


def join_language(ranks: list[dict[str, tuple[int, Tensor]]], cfg) -> dict[str, Tensor]:
    """Each rank's {our global name: (tensor rank, part)} -> whole tensors by released name."""
    shards: dict[str, dict[int, Tensor]] = {}
    for parts in ranks:
        for name, (rank, part) in parts.items():
            held = shards.setdefault(name, {}).setdefault(rank, part)
            assert torch.equal(held, part), f"{name} differs between ranks that hold the same part"
    whole: dict[str, Tensor] = {}
    for name, held in shards.items():
        link = language_link(name, cfg)
        joined = join([held[rank] for rank in sorted(held)], link.shard)
        whole |= {n: t.clone() for n, t in zip(link.released, link.split(joined))}
    return whole


def join(parts: list[Tensor], shard: str) -> Tensor:
    """Tensor ranks' parts of one parameter -> the whole; `shard` as in names.Link."""
    if shard == "none":
        assert all(torch.equal(part, parts[0]) for part in parts), "tensor ranks disagree on a replicated tensor"
    if shard == "none" or len(parts) == 1:
        return parts[0]
    if shard == "gated":
        return torch.cat([half for i in (0, 1) for half in (part.chunk(2)[i] for part in parts)])
    return torch.cat(parts, dim=1 if shard == "columns" else 0)
