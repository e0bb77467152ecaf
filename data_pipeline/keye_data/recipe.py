"""What the data side needs of a recipe, whose other sections are the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from keye_data.errors import DataError
from keye_data.settings import DataConfig

PROFILE = "profile="


@dataclass
class DataRecipe:
    name: str
    data: DataConfig
    micro_batch_size: int
    seed: int


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> DataRecipe:
    """The recipe at `path` with `a.b=c` overrides and at most one `profile=NAME`, merged as the trainer merges them.

    Overrides of the sections `data` and `training` are used, others are read and have no effect here. DataError naming
    the file, profile, key or override at fault.
    """
    if not path.is_file():
        raise DataError(f"recipe {path} not found")
    try:
        recipe = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise DataError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, DictConfig):
        raise DataError(f"{path}: a recipe is a mapping of sections")
    if "data" not in recipe:
        raise DataError(f"{path}: it has no `data` section")
    profiles = recipe.pop("profiles", None) or OmegaConf.create({})
    for name in [text.removeprefix(PROFILE) for text in overrides if text.startswith(PROFILE)]:
        if name not in profiles:
            raise DataError(f"{path} has no profile '{name}'; its profiles: {', '.join(map(str, profiles)) or 'none'}")
        recipe = OmegaConf.merge(recipe, profiles[name] or {})  # type: ignore[assignment]
    for text in overrides:
        if not text.startswith(PROFILE):
            _override(recipe, text)
    try:
        section = OmegaConf.select(recipe, "data") or {}
        data: DataConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), section))  # type: ignore[assignment]
        return DataRecipe(
            name=str(OmegaConf.select(recipe, "name", default=path.stem)),
            data=data,
            micro_batch_size=int(OmegaConf.select(recipe, "training.micro_batch_size", default=1)),
            seed=int(OmegaConf.select(recipe, "training.seed", default=1234)),
        )
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        where = f"data.{key}" if key and not str(key).startswith("data") else str(key or "data")
        raise DataError(f"{path}: {where}: {str(error).splitlines()[0]}") from error


def _override(recipe: DictConfig, text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise DataError(f"'{text}' is no override; write key=value, for instance data.workers=0 or profile=mini")
    try:
        value = raw if _is_text(key) and raw != "null" else OmegaConf.from_dotlist([f"value={raw}"])["value"]
        OmegaConf.update(recipe, key, value, force_add=True)
    except (OmegaConfBaseException, YAMLError, AssertionError, ValueError, IndexError, KeyError) as error:
        raise DataError(f"override '{text}': {str(error).splitlines()[0] if str(error) else error!r}") from error


def _is_text(key: str) -> bool:
    """Whether the schema has text at dotted `key`, which is then taken as written: "data.system_prompt=You are: kind"."""
    kind: Any = DataConfig
    for part in key.split(".")[1:]:
        kind = get_args(kind)[0] if part.isdigit() and get_args(kind) else kind
        kind = kind if part.isdigit() else get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return key.startswith("data.") and (kind is str or str in get_args(kind))
