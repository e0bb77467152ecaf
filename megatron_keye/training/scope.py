"""What trains. A parameter outside the scope has no gradient, no optimizer state, and does not change by a bit."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def is_trained(name: str, scope: str) -> bool:
    """`name` as in KeyeModel: language_model.* or visual.*"""
    if "packing_position_embedding" in name:
        return False  # carried through conversion only
    indexer = ".indexer." in name
    return {
        "all": True,
        "all_but_indexers": not indexer,
        "indexers": indexer,
        "projector": name.startswith("visual.projector."),
    }[scope]


def apply_scope(language_models: Iterable[nn.Module], tower: nn.Module, scope: str) -> dict[str, tuple[int, int]]:
    """Sets requires_grad everywhere -> part: (parameters trained, parameters in all), of this rank."""
    counts: dict[str, tuple[int, int]] = {}
    named = [(f"language_model.{n}", p) for model in language_models for n, p in model.named_parameters()]
    named += [(f"visual.{n}", p) for n, p in tower.named_parameters()]
    for name, parameter in named:
        parameter.requires_grad_(is_trained(name, scope))
        trained, total = counts.get(part_of(name), (0, 0))
        counts[part_of(name)] = trained + parameter.numel() * parameter.requires_grad, total + parameter.numel()
    return counts


def part_of(name: str) -> str:
    if ".indexer." in name:
        return "indexers"
    if name.startswith("visual.projector."):
        return "projector"
    return "vision encoder" if name.startswith("visual.") else "language model"
