"""Everything about a recipe that can be known before anything is built, all faults at once, one line each."""

from __future__ import annotations

from megatron_keye.config.layout import layout_errors
from megatron_keye.config.model_values import model_errors
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.values import mode_errors, value_errors, warnings
from megatron_keye.errors import UserError


def validate(recipe: Recipe, world_size: int) -> list[str]:
    """Warnings, one line each. Raises UserError with one line per fault, each with the nearest valid choice."""
    errors = value_errors(recipe) + model_errors(recipe.model) + mode_errors(recipe)
    if not errors:  # the layout is reckoned from values that must make sense first
        errors = layout_errors(recipe, world_size)
    if errors:
        raise UserError("\n".join(errors))
    return warnings(recipe)
