"""How the rotary frequencies are shared out among the three position axes (t, h, w)."""

from __future__ import annotations

from megatron_keye.config.model import ModelConfig
from megatron_keye.config.schema import nearest
from megatron_keye.errors import UserError

# Frequencies per axis at head_dim 128, by layout; other head dimensions scale them.
LAYOUTS: dict[str, tuple[int, int, int]] = {"chunked": (16, 24, 24), "interleaved": (24, 20, 20)}
_LAYOUT_HEAD_DIM = 128


def mrope_sections(cfg: ModelConfig) -> list[int]:
    """Frequencies of (t, h, w) in the language model; their sum is head_dim / 2. Raises UserError where none fit."""
    if cfg.mrope_layout not in LAYOUTS:
        near = nearest(cfg.mrope_layout, LAYOUTS)
        raise UserError(f"model.mrope_layout = {cfg.mrope_layout!r} is none of {', '.join(LAYOUTS)}; nearest: {near}")
    if cfg.mrope_section is None:
        sections = _scaled(LAYOUTS[cfg.mrope_layout], cfg.head_dim, _LAYOUT_HEAD_DIM)
        if sections is None:
            raise UserError(
                f"model.head_dim = {cfg.head_dim} does not scale the {cfg.mrope_layout} sections "
                f"{list(LAYOUTS[cfg.mrope_layout])} of head_dim 128 to whole numbers; set model.mrope_section"
            )
    else:
        sections = list(cfg.mrope_section)
    _check(cfg, sections, cfg.head_dim, "model.mrope_section")
    return sections


def indexer_sections(cfg: ModelConfig) -> list[int]:
    """Frequencies of (t, h, w) in the indexer: the language model's, scaled by indexer_head_dim / head_dim. Raises UserError."""
    sections = mrope_sections(cfg)
    scaled = _scaled(sections, cfg.indexer_head_dim, cfg.head_dim)
    if scaled is None:
        raise UserError(
            f"model.indexer_head_dim = {cfg.indexer_head_dim} does not scale the sections {sections} of head_dim "
            f"{cfg.head_dim} to whole numbers; nearest: {_nearest_head_dim(sections, cfg)}"
        )
    _check(cfg, scaled, cfg.indexer_head_dim, "the indexer's sections")
    return scaled


def _scaled(sections: list[int] | tuple[int, ...], head_dim: int, old_head_dim: int) -> list[int] | None:
    """`sections` x head_dim / old_head_dim, or None when that is not whole."""
    if any(n * head_dim % old_head_dim for n in sections):
        return None
    return [n * head_dim // old_head_dim for n in sections]


def _nearest_head_dim(sections: list[int], cfg: ModelConfig) -> int:
    good = [d for d in range(2, cfg.head_dim + 1, 2) if _scaled(sections, d, cfg.head_dim)]
    return min(good, key=lambda d: abs(d - cfg.indexer_head_dim))


def _check(cfg: ModelConfig, sections: list[int], head_dim: int, name: str) -> None:
    if len(sections) != 3 or min(sections) < 1 or 2 * sum(sections) != head_dim:
        raise UserError(f"{name} = {sections} must be three positive numbers (t, h, w) that sum to {head_dim // 2}")
    half = head_dim // 2
    if cfg.mrope_layout == "interleaved" and 3 * max(sections[1:]) > half:  # h and w take every third frequency
        default = _scaled(LAYOUTS["interleaved"], head_dim, _LAYOUT_HEAD_DIM)
        raise UserError(
            f"{name} = {sections}: interleaved h and w sections take every third of {half} frequencies, so at most "
            f"{half // 3} each; the layout's own are {default}"
        )
