"""Settings with which Megatron-Core trains wrongly and says nothing: refused when a configuration is made.

All faults known, these and those that other code keeps us from, are listed with their tests in
tests/parallel/test_known_faults.py.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_keye.config.layout import megatron_below_0_19


def refuse_known_faults(config: TransformerConfig) -> None:
    """Raises ValueError naming the settings and what each would do."""
    has_experts = config.num_moe_experts is not None
    tensor = config.tensor_model_parallel_size
    experts_cut_otherwise = (config.expert_tensor_parallel_size or tensor) != tensor
    faults = [
        (
            has_experts and config.expert_model_parallel_size == 1 and experts_cut_otherwise and megatron_below_0_19(),
            "expert_tensor_parallel_size other than tensor_model_parallel_size without expert parallelism: "
            "the experts' gradients are not summed over the tensor ranks (fixed in 0.19)",
        ),
        (
            has_experts and config.use_cpu_initialization,
            "use_cpu_initialization: experts of equal local number start with equal weights on all ranks",
        ),
        (
            config.pipeline_model_parallel_size > 1 and config.deallocate_pipeline_outputs,
            "deallocate_pipeline_outputs: an asynchronous send of gloo reads the freed tensor",
        ),
        (
            config.virtual_pipeline_model_parallel_size is not None and config.batch_p2p_comm,
            "batch_p2p_comm with interleaved stages: messages of two ranks to each other are taken for one another",
        ),
        (
            has_experts and config.moe_permute_fusion,
            "moe_permute_fusion: room is made for tokens x top-k, and padding, which goes nowhere, leaves it unwritten",
        ),
        (
            not config.calculate_per_token_loss,
            "calculate_per_token_loss off: gradients are multiplied by the context parallel size",
        ),
    ]
    if found := [text for present, text in faults if present]:
        raise ValueError("Megatron-Core would train wrongly and say nothing with " + "; and ".join(found))
