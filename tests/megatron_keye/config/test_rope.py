"""Sections of the rotary frequencies, against the published figures."""

from __future__ import annotations

import pytest

from megatron_keye.config.model import build_config
from megatron_keye.config.rope import indexer_sections, mrope_sections
from megatron_keye.errors import UserError


@pytest.mark.parametrize(
    "preset, rope_layout, language, indexer",
    [
        ("keye_vl2_30b_a3b", "chunked", [16, 24, 24], [8, 12, 12]),
        ("keye_vl2_30b_a3b", "interleaved", [24, 20, 20], [12, 10, 10]),
        ("keye_mini", "chunked", [8, 12, 12], [4, 6, 6]),
        ("keye_mini", "interleaved", [12, 10, 10], [6, 5, 5]),
    ],
)
def test_defaults(preset, rope_layout, language, indexer):
    cfg = build_config(preset, mrope_layout=rope_layout)
    assert mrope_sections(cfg) == language
    assert indexer_sections(cfg) == indexer
    assert (2 * sum(language), 2 * sum(indexer)) == (cfg.head_dim, cfg.indexer_head_dim)


def test_own_sections():
    cfg = build_config("keye_vl2_30b_a3b", mrope_section=[32, 16, 16])
    assert (mrope_sections(cfg), indexer_sections(cfg)) == ([32, 16, 16], [16, 8, 8])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mrope_section": [16, 24, 25]}, "sum to 64"),
        ({"mrope_section": [40, 24]}, "three positive numbers"),
        ({"mrope_section": [0, 32, 32]}, "three positive numbers"),
        ({"mrope_layout": "interleaved", "mrope_section": [16, 24, 24]}, r"at most 21 each.*\[24, 20, 20\]"),
        ({"mrope_layout": "interleaved", "mrope_section": [22, 22, 20]}, "at most 21 each"),
        ({"mrope_layout": "woven"}, "'woven' is none of chunked, interleaved"),
        ({"head_dim": 100}, "head_dim = 100 does not scale"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        mrope_sections(build_config("keye_vl2_30b_a3b", **overrides))


def test_indexer_sections_must_be_whole():
    with pytest.raises(UserError, match=r"indexer_head_dim = 40 .* nearest: 32"):
        indexer_sections(build_config("keye_vl2_30b_a3b", indexer_head_dim=40))
