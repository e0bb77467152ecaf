"""Which layouts are possible: tensor, context, pipeline and expert sizes against the model, the batch and the world."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from math import gcd, lcm

from megatron_keye.config.divisibility import divisors, nearest_multiples, nearest_of
from megatron_keye.config.recipe import Recipe


def layout_errors(recipe: Recipe, world_size: int) -> list[str]:
    """One line per fault, with the nearest valid choice."""
    errors = _model_errors(recipe) + _sequence_errors(recipe)
    world = _world_errors(recipe, world_size)
    return errors + (world or _batch_errors(recipe, world_size))


def _model_errors(recipe: Recipe) -> list[str]:
    model, p = recipe.model, recipe.parallel
    errors = []
    shared = gcd(model.num_query_groups, model.num_attention_heads, model.vocab_size)
    for key, size, whole, of in (
        ("tensor", p.tensor, shared, "num_query_groups, num_attention_heads and vocab_size"),
        ("expert", p.expert, model.num_experts, "num_experts"),
        ("expert_tensor", p.expert_tensor, model.moe_ffn_hidden_size, "moe_ffn_hidden_size"),
        ("pipeline", p.pipeline, model.num_layers, "num_layers"),
    ):
        if whole % size:
            near = nearest_of(size, divisors(whole))
            errors.append(f"parallel.{key} = {size} does not divide model.{of} ({whole}); the nearest is {near}")
    virtual = p.virtual_pipeline
    if virtual is not None and model.num_layers % p.pipeline == 0:
        layers = model.num_layers // p.pipeline
        if p.pipeline == 1:
            errors.append(
                f"parallel.virtual_pipeline = {virtual} needs parallel.pipeline of 2 or more; the nearest is null"
            )
        elif virtual == 1:
            errors.append("parallel.virtual_pipeline = 1 interleaves nothing; the nearest is null")
        elif layers % virtual:
            near = nearest_of(virtual, divisors(layers))
            errors.append(
                f"parallel.virtual_pipeline = {virtual} does not divide the {layers} layers of a stage; the nearest is {near}"
            )
    if p.dispatcher == "flex" and p.expert * p.expert_tensor == 1:
        errors.append(
            "parallel.dispatcher = 'flex' has nowhere to send tokens with all experts on one rank; the nearest is 'alltoall'"
        )
    if p.expert == 1 and p.expert_tensor != p.tensor and not errors and megatron_below_0_19():
        errors.append(
            f"parallel.expert_tensor = {p.expert_tensor} with parallel.expert = 1 and parallel.tensor = {p.tensor} trains the experts "
            f"wrongly in Megatron-Core below 0.19; the nearest is expert_tensor = {p.tensor} (or expert = 2)"
        )
    return errors


def _sequence_errors(recipe: Recipe) -> list[str]:
    seq, p = recipe.data.seq_length, recipe.parallel
    base = lcm(2 * p.context if p.context > 1 else 1, p.tensor * p.context)
    if seq % base == 0:
        return []
    why = "2 x parallel.context and parallel.tensor x parallel.context"
    return [f"data.seq_length = {seq} is no multiple of {base} ({why}); the nearest is {nearest_multiples(seq, base)}"]


def _world_errors(recipe: Recipe, world_size: int) -> list[str]:
    p = recipe.parallel
    dense, experts = p.tensor * p.context * p.pipeline, p.expert_tensor * p.expert * p.pipeline
    near = nearest_multiples(world_size, lcm(dense, experts))
    errors = []
    if world_size % dense:
        errors.append(
            f"{world_size} ranks are no multiple of tensor x context x pipeline = {dense}; the nearest is {near} ranks"
        )
    if world_size % experts:
        errors.append(
            f"{world_size} ranks are no multiple of expert_tensor x expert x pipeline = {experts}; the nearest is {near} ranks"
        )
    return errors


def _batch_errors(recipe: Recipe, world_size: int) -> list[str]:
    training, p = recipe.training, recipe.parallel
    data_ranks = world_size // (p.tensor * p.context * p.pipeline)
    base = training.micro_batch_size * data_ranks
    rows, why = training.global_batch_size, f"micro_batch_size x {data_ranks} data-parallel ranks"
    if p.virtual_pipeline is not None:  # Megatron's interleaved schedule takes micro-batches in groups of one per stage
        base, why = base * p.pipeline, why + f" x {p.pipeline} interleaved stages"
    if rows % base == 0:
        return []
    return [
        f"training.global_batch_size = {rows} is no multiple of {base} ({why}); the nearest is {nearest_multiples(rows, base)}"
    ]


def megatron_below_0_19() -> bool:
    """Whether the Megatron-Core installed is one before 0.19."""
    try:
        major, minor = version("megatron-core").split(".")[:2]
    except PackageNotFoundError:
        return True  # nothing to train with here; judge by the oldest version supported
    return (int(major), int(minor)) < (0, 19)
