"""A recipe from YAML: schema defaults -> YAML -> its `profiles.<name>` block -> dotted overrides; the preset fills the rest.

load_recipe("recipes/stage1.yaml", ["profile=mini", "optimizer.lr=1e-5"])
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_keye.config import schema
from megatron_keye.config.model import ModelConfig, preset_values
from megatron_keye.config.overrides import apply_override
from megatron_keye.config.recipe import Recipe
from megatron_keye.config.yaml_io import dump_yaml, load_yaml
from megatron_keye.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path` with `a.b=c` overrides and at most one `profile=NAME`. Raises UserError; see `validate` for values."""
    path = Path(path)
    data = layered(Recipe, path, overrides)
    model = data.get("model", {})
    data = merge(data, {"model": {**preset_values(str(model.get("preset", ModelConfig.preset))), **model}})
    return schema.instance(Recipe, schema.typed(Recipe, data, str(path)), str(path))


def layered(cls: type, path: Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """What the file at `path`, its chosen profile and the overrides set of the schema `cls`, defaults left out. Raises UserError."""
    data, profiles = _read(path)
    data = schema.conform(cls, data, str(path))
    profiles = {name: schema.conform(cls, block, f"{path}, profile '{name}'") for name, block in profiles.items()}

    chosen = [text.partition("=")[2] for text in overrides if text.startswith("profile=")]
    if len(chosen) > 1:
        raise UserError(f"more than one profile given ({', '.join(chosen)}); choose one")
    for name in chosen:
        if name not in profiles:
            raise UserError(f"{path} has no profile '{name}'; its profiles: {', '.join(profiles) or 'none'}")
        data = merge(data, profiles[name])
    for text in overrides:
        if not text.startswith("profile="):
            data = schema.conform(cls, apply_override(cls, data, text), f"override '{text}'")
    return data


def recipe_yaml(recipe: Recipe) -> str:
    """Every value of `recipe` as YAML that `load_recipe` turns into an equal object."""
    return dump_yaml(_escaped(dataclasses.asdict(recipe)))


def save_resolved(recipe: Recipe, path: str | Path) -> None:
    """`recipe_yaml` into a file, whose folder is made. Raises UserError where it cannot be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(recipe_yaml(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another run_dir or make room") from error


def merge(base: Any, top: Any) -> Any:
    """`top` over `base`: mappings key by key, everything else (lists too) replaced."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in top.items()}}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the recipe proper, its profiles)."""
    if not path.is_file():
        folder = path.parent if list(path.parent.glob("*.yaml")) else RECIPES
        nearby = sorted(folder.glob("*.yaml"))
        near = f" (nearest: {folder / schema.nearest(path.name, [p.name for p in nearby])})" if nearby else ""
        names = ", ".join(p.stem for p in nearby) or "no recipe"
        raise UserError(f"recipe {path} not found; {folder} holds {names}{near}")
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not {type(data).__name__}")
    profiles = data.pop("profiles", None) or {}
    if not isinstance(profiles, dict):
        raise UserError(f"{path}: 'profiles' maps names to sections, it is no {type(profiles).__name__}")
    return data, {str(name): block or {} for name, block in profiles.items()}


def _escaped(value: Any) -> Any:
    """Text as OmegaConf must read it to give it back: a literal ${ is no reference."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
