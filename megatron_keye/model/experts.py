"""The experts of a layer as two grouped matrix products, by torch's own grouped_mm: no Transformer Engine needed.

The same numbers and the same checkpoint as Megatron's SequentialMLP, which runs one expert after another and is what
a CPU is best served with. Shapes: E experts of this rank, n tokens sorted by expert, h hidden, f expert width / TP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import nn
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.aten._grouped_mm)
def grouped_flops(a_shape, b_shape, *_, out_shape=None, **__) -> int:
    """For torch's counters of work, which do not know it: every row or column belongs to one group."""
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def grouped_by_torch(wanted: bool | None, dtype: torch.dtype) -> bool:
    """`wanted` None: on CUDA, for the types that grouped_mm knows."""
    return torch.cuda.is_available() and dtype is not torch.float64 if wanted is None else wanted


class GroupedLinear(nn.Module):
    """weight [E, out, in]. `axis` of one expert's weight is what tensor parallelism cuts: 0 or 1."""

    def __init__(self, experts: int, out: int, width: int, axis: int, config: TransformerConfig):
        super().__init__()
        make = dict(dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(torch.empty(experts, out, width, **make))
        set_tensor_model_parallel_attributes(self.weight, True, axis + 1, 1)
        # Not summed over all data-parallel ranks, where those hold different experts.
        self.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [n, in], ends int32 [E]: where each expert's tokens end -> [n, out]"""
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    def get_extra_state(self) -> None:
        """Megatron's linear layers write an empty one, and expect it."""

    def set_extra_state(self, state: Any) -> None: ...


class GroupedExperts(MegatronModule):
    """Takes SequentialMLP's place in a layer's spec."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        self.count, self.groups = num_local_experts, pg_collection
        ffn = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = GroupedLinear(num_local_experts, 2 * ffn, config.hidden_size, 0, config)  # gate, then up
        self.linear_fc2 = GroupedLinear(num_local_experts, config.hidden_size, ffn, 1, config)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,  # [n, h]
        tokens_per_expert: torch.Tensor,  # int64 [E]
        permuted_probs: torch.Tensor,  # [n]
    ) -> tuple[torch.Tensor, None]:
        """-> [n, h], weighted by probs, and no bias"""
        x = permuted_local_hidden_states
        if len(x) == 0:
            return x, None
        ends = tokens_per_expert.to(x.device).cumsum(0, dtype=torch.int32)
        gate, up = self.linear_fc1(x, ends).chunk(2, dim=-1)
        inner = (self.config.activation_func(gate) * up * permuted_probs[:, None]).to(x.dtype)
        return self.linear_fc2(inner, ends), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """SequentialMLP's entries: a tensor for each expert, gate and up apart where tensor parallelism cuts."""
        state: dict[str, Any] = {}
        tp = self.groups.expt_tp
        replica = (0, 0, self.groups.expt_dp.rank())
        for name, axis, halves in (("linear_fc1", 0, 2), ("linear_fc2", 1, 1)):
            places = self._places(sharded_offsets)

            def build(key, weight, replica_id, _, places=places, axis=axis, halves=halves) -> list[ShardedTensor]:
                return [
                    ShardedTensor.from_rank_offsets(
                        key,
                        part,
                        *place,
                        (len(place) + axis, tp.rank() + i * tp.size(), halves * tp.size()),
                        replica_id=replica_id,
                        prepend_axis_num=len(place),
                    )
                    for one, place in zip(weight, places)
                    for i, part in enumerate(one.chunk(halves))
                ]

            def merge(parts: list[torch.Tensor], halves=halves) -> torch.Tensor:
                return torch.stack([torch.cat(parts[i : i + halves]) for i in range(0, len(parts), halves)])

            key = f"{prefix}experts.{name}"
            weight = getattr(self, name).weight
            state[f"{prefix}{name}.weight"] = ShardedTensorFactory(f"{key}.weight", weight, build, merge, replica)
            state[f"{prefix}{name}._extra_state"] = self._nothing(
                f"{key}._extra_state", places, (0, tp.rank(), replica[2])
            )
        return state

    def _places(self, sharded_offsets: tuple) -> list[tuple]:
        """For each expert the offsets in front of its tensors: those of the layer, and its number among all experts."""
        ep = self.groups.ep
        first, everyone = ep.rank() * self.count, ep.size() * self.count
        return [(*sharded_offsets, (len(sharded_offsets), first + i, everyone)) for i in range(self.count)]

    def _nothing(self, key: str, places: list[tuple], replica: tuple[int, int, int]) -> list[ShardedObject]:
        return [make_sharded_object_for_checkpoint(None, key, place, replica) for place in places]
