"""The start of a new Keye: plain Qwen3-MoE, a vision tower from another folder, and drawn what nobody has yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_keye.config import schema
from megatron_keye.config.model import BEHAVIOUR, ModelConfig
from megatron_keye.config.model_values import model_errors
from megatron_keye.conversion.entries import Entry
from megatron_keye.errors import UserError
from megatron_keye.model.hf_config import INDEXER, LANGUAGE, TOKENS, VISION, read_config
from megatron_keye.model.hf_files import Checkpoint, Source
from megatron_keye.model.init import draw

INDEXERS, VIT, PROJECTOR = ".sa_indexer.", "visual.", "mlp_AR."
HEAD = "visual.vision_model.head."  # SigLIP's pooling head: in some folders, in no Keye
Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What a new model is made of, besides the language model. Each part is named once: a folder, or drawn."""

    vision_hf: Path | None = None  # holds visual.* and, unless the projector is drawn, mlp_AR.*
    draw_indexers: bool = False
    draw_vision: bool = False
    draw_projector: bool = False
    model: ModelConfig | None = None  # a recipe's; None: what the folders say, and the released sizes where they do not
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.draw_indexers:
            raise UserError("a new Keye needs indexers, and no folder has them yet; give --indexers init")
        if (self.vision_hf is None) != self.draw_vision:
            raise UserError("a new Keye needs a vision tower; give either --vision-hf DIR or --vision init")
        if self.vision_hf is None and not self.draw_projector:
            raise UserError("a drawn vision tower brings no projector; give --projector init too")


def start_config(hf: Path, start: Start, say: Say) -> ModelConfig:
    """The new model's section. Raises UserError where recipe, language model and vision tower do not fit together."""
    plain = read_config(hf)
    if plain.indexer_heads:
        raise UserError(
            f"{hf} is a whole Keye with a vision tower and indexers of its own; import it without --indexers"
        )
    told = {} if start.vision_hf is None else _told(start.vision_hf, say)
    cfg = start.model
    if cfg is None:
        language = {key: getattr(plain, key) for key in (*LANGUAGE, "rope_theta")}
        where = str(start.vision_hf or hf)
        cfg = schema.instance(ModelConfig, schema.typed(ModelConfig, {**language, **told}, where), where)
        say(f"no recipe: indexers of {cfg.indexer_heads} heads of {cfg.indexer_head_dim}, top-k {cfg.topk}")
    for key in (*LANGUAGE, "rope_theta"):
        ours, theirs = getattr(cfg, key), getattr(plain, key)
        if ours != theirs and key not in BEHAVIOUR:
            raise UserError(f"{hf}: {key} is {theirs} there and {ours} in the recipe; name the recipe of this model")
        if ours != theirs:
            say(f"{key} is {theirs} in {hf} and {ours} in the recipe, which counts")
    for key in VISION:
        if (theirs := told.get(key, getattr(cfg, key))) != getattr(cfg, key):
            raise UserError(
                f"{start.vision_hf}: {key} is {theirs} there and {getattr(cfg, key)} in the recipe; name another folder, "
                "or the recipe of this vision tower"
            )
    if errors := model_errors(cfg):
        raise UserError("\n".join(errors))
    return cfg


def _told(folder: Path, say: Say) -> dict[str, Any]:
    """Keys of the model section that the vision tower's folder decides, as far as its config.json has them.

    Shapes of tensors do not tell them all: heads, epsilons, the angles of positions.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        values = _renamed(raw.get("vision_config") or {}, VISION)
        if not values:
            say(
                f"{path} says nothing of the vision tower: its heads, epsilons and rope_theta are taken to be the model's"
            )
            return {}
        if "image_size" in raw["vision_config"] and "patch_size" in values:
            values["vision_position_grid"] = raw["vision_config"]["image_size"] // values["patch_size"]
        values |= _renamed(raw.get("sa_config") or {}, INDEXER) | _renamed(raw, TOKENS)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a model's configuration ({error})") from error
    return values


def _renamed(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: section[theirs] for ours, theirs in names.items() if theirs in section}


class Joined:
    """Tensors of several sources as one: the language model's, the vision tower's, and the drawn."""

    def __init__(
        self,
        language: Source,
        start: Start,
        entries: Sequence[Entry],
        cfg: ModelConfig,
        dtype: torch.dtype | None,  # None: what is drawn has the language model's
        say: Say,
    ):
        self.folder = language.folder
        self._of: dict[str, Source] = dict.fromkeys(language.names(), language)
        wanted = {PROJECTOR: start.draw_projector, VIT: start.draw_vision, INDEXERS: start.draw_indexers}
        drawn = [mark for mark, is_drawn in wanted.items() if is_drawn]
        kind = dtype or language.dtype("model.embed_tokens.weight")
        source = Drawn(entries, cfg, start.seed, kind, self.folder)
        names = [name for name in source.names() if any(mark in name for mark in drawn)]
        self._of |= dict.fromkeys(names, source)
        say(f"{len(names)} tensors of {', '.join(mark.strip('.') for mark in drawn)} are drawn with seed {start.seed}")
        if start.vision_hf is not None:
            tower = Checkpoint(start.vision_hf)
            taken = (VIT,) if start.draw_projector else (VIT, PROJECTOR)
            names = [name for name in tower.names() if name.startswith(taken) and not name.startswith(HEAD)]
            self._of |= dict.fromkeys(names, tower)
            say(f"{len(names)} tensors of the vision tower are those of {start.vision_hf}")
            if heads := sum(name.startswith(HEAD) for name in tower.names()):
                say(f"{heads} tensors of its pooling head ({HEAD}*) are left out: Keye has none")

    def names(self) -> list[str]:
        return list(self._of)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def shape(self, name: str) -> list[int]:
        return self._of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of[name].dtype(name)

    def get(self, name: str) -> torch.Tensor:
        return self._of[name].get(name)


class Drawn:
    """Every tensor of a model as training draws it with the same seed."""

    def __init__(self, entries: Sequence[Entry], cfg: ModelConfig, seed: int, dtype: torch.dtype, folder: Path):
        self.folder, self._cfg, self._seed, self._dtype = folder, cfg, seed, dtype
        self._where: dict[str, tuple[Entry, int]] = {
            name: (entry, i) for entry in entries for i, name in enumerate(entry.link.released)
        }

    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> list[int]:
        entry, i = self._where[name]
        return list(entry.released_shapes[i])

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def get(self, name: str) -> torch.Tensor:
        entry, i = self._where[name]
        values: Any = torch.empty(entry.parameter.shape, dtype=self._dtype)
        draw(values, entry.link, entry.name, self._cfg, self._seed)
        return entry.link.split(values)[i]
