"""The full-size preset has exactly the released model's parameters, part by part."""

from __future__ import annotations

import pytest
import torch

from megatron_keye.model import KeyeModel, build_config, build_model
from megatron_keye.parallel import plan
from megatron_keye.training.scope import part_of

RELEASED = {
    "language model": 30_532_122_624,
    "indexers": 108_536_832,
    "vision encoder": 450_735_984,
    "projector": 30_686_720,
}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        yield build_model(build_config("keye_vl2_30b_a3b"))
    plan.shut_down()


def count(model: KeyeModel) -> dict[str, int]:
    parts = dict.fromkeys(RELEASED, 0)
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return parts


def test_every_part(full_size):
    assert count(full_size) == RELEASED
    assert sum(RELEASED.values()) == 31_122_082_160


def test_each_indexer(full_size):
    sizes = [
        sum(p.numel() for p in layer.self_attention.indexer.parameters())
        for layer in full_size.language_model.decoder.layers
    ]
    assert sizes == [2_261_184] * 48


def test_no_memory_is_taken(full_size):
    assert all(p.is_meta for p in full_size.parameters())


def test_a_part_that_is_absent_has_none():
    with torch.device("meta"):
        model = build_model(build_config("keye_vl2_30b_a3b", num_layers=1, vision_layers=0, indexer_heads=0))
    assert {name: n for name, n in count(model).items() if n} == {
        "language model": 30_532_122_624 - 47 * (30_532_122_624 - 2 * 151_936 * 2048 - 2048) // 48
    }
