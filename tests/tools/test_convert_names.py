"""`convert.py names`: the same tensors out of every layout, and those that a real export writes."""

from __future__ import annotations

from math import prod

import pytest
from safetensors.torch import load_file

from megatron_keye.errors import UserError
from megatron_keye.model import build_config, build_model, to_hf
from megatron_keye.parallel import plan
from tools.convert import main

LAYOUTS = [(1, 1, 1), (2, 8, 1), (4, 8, 4), (1, 16, 2)]  # tensor, expert, pipeline
TOTAL = 31_122_082_160


@pytest.fixture(autouse=True)
def _groups():
    yield
    plan.shut_down()


def lines(capsys, preset: str, *arguments: str) -> dict[str, list[int]]:
    assert main(["names", "--preset", preset, *arguments]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {dtype for _, _, dtype in rows} == {"bf16"}
    shapes = {name: [int(n) for n in shape.strip("[]").split(",")] for name, shape, _ in rows}
    assert len(shapes) == len(rows)
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_size_in_every_layout(layout, capsys):
    tensor, expert, pipeline = map(str, layout)
    shapes = lines(capsys, "keye_vl2_30b_a3b", "--tp", tensor, "--ep", expert, "--pp", pipeline)
    assert sum(map(prod, shapes.values())) == TOTAL
    assert len(shapes) == 48 * 16 + 3 + 27 * 16 + 6 + 6  # layers, top, encoder layers, its top, projector
    for layer in (0, 23, 47):
        base = f"model.layers.{layer}."
        assert shapes[f"{base}mlp.experts.gate_up_proj"] == [128, 2048, 1536]
        assert shapes[f"{base}mlp.experts.down_proj"] == [128, 768, 2048]
        assert shapes[f"{base}self_attn.q_proj.weight"] == [4096, 2048]
        assert shapes[f"{base}self_attn.k_proj.weight"] == [512, 2048]
        assert shapes[f"{base}self_attn.o_proj.weight"] == [2048, 4096]
        assert shapes[f"{base}self_attn.sa_indexer.q_proj.weight"] == [1040, 2048]
    assert shapes["visual.vision_model.embeddings.packing_position_embedding.weight"] == [32_768, 1152]


@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_they_are_what_an_export_writes(experts, tmp_path, capsys):
    to_hf(build_model(build_config("keye_mini")), tmp_path / "hf", experts=experts)
    names = lines(capsys, "keye_mini", "--experts", experts, "--tp", "2", "--ep", "2")
    written: dict[str, list[int]] = {}
    for shard in (tmp_path / "hf").glob("*.safetensors"):
        written |= {name: list(tensor.shape) for name, tensor in load_file(shard).items()}
    assert names == written


def test_impossible_layout():
    with pytest.raises(UserError, match=r"parallel\.tensor = 3"):
        main(["names", "--preset", "keye_mini", "--tp", "3"])
