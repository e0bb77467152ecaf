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


def released(experts: str) -> dict[str, list[int]]:
    """Keye-VL-2.0-30B-A3B as it is published, written out; not computed by anything that is tested here."""
    hidden, vision, merged = 2048, 1152, 4608
    shapes = {"model.embed_tokens.weight": [151_936, hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [151_936, hidden]
    for layer in range(48):
        base = f"model.layers.{layer}."
        shapes |= {
            f"{base}input_layernorm.weight": [hidden],
            f"{base}post_attention_layernorm.weight": [hidden],
            f"{base}self_attn.q_proj.weight": [4096, hidden],
            f"{base}self_attn.k_proj.weight": [512, hidden],
            f"{base}self_attn.v_proj.weight": [512, hidden],
            f"{base}self_attn.o_proj.weight": [hidden, 4096],
            f"{base}self_attn.q_norm.weight": [128],
            f"{base}self_attn.k_norm.weight": [128],
            f"{base}self_attn.sa_indexer.q_proj.weight": [1040, hidden],
            f"{base}self_attn.sa_indexer.k_proj.weight": [64, hidden],
            f"{base}self_attn.sa_indexer.q_norm.weight": [64],
            f"{base}self_attn.sa_indexer.k_norm.weight": [64],
            f"{base}self_attn.sa_indexer.k_norm.bias": [64],
            f"{base}mlp.gate.weight": [128, hidden],
        }
        if experts == "fused":
            shapes[f"{base}mlp.experts.gate_up_proj"] = [128, hidden, 1536]
            shapes[f"{base}mlp.experts.down_proj"] = [128, 768, hidden]
        else:
            for e in range(128):
                shapes[f"{base}mlp.experts.{e}.gate_proj.weight"] = [768, hidden]
                shapes[f"{base}mlp.experts.{e}.up_proj.weight"] = [768, hidden]
                shapes[f"{base}mlp.experts.{e}.down_proj.weight"] = [hidden, 768]
    top = "visual.vision_model."
    shapes |= {
        f"{top}embeddings.patch_embedding.weight": [vision, 3, 14, 14],
        f"{top}embeddings.patch_embedding.bias": [vision],
        f"{top}embeddings.position_embedding.weight": [729, vision],
        f"{top}embeddings.packing_position_embedding.weight": [32_768, vision],
        f"{top}post_layernorm.weight": [vision],
        f"{top}post_layernorm.bias": [vision],
        "mlp_AR.pre_norm.weight": [merged],
        "mlp_AR.pre_norm.bias": [merged],
        "mlp_AR.linear_1.weight": [merged, merged],
        "mlp_AR.linear_1.bias": [merged],
        "mlp_AR.linear_2.weight": [hidden, merged],
        "mlp_AR.linear_2.bias": [hidden],
    }
    for layer in range(27):
        base = f"{top}encoder.layers.{layer}."
        matrices = {f"self_attn.{x}_proj": [vision, vision] for x in ("q", "k", "v", "out")}
        matrices |= {
            "mlp.fc1": [4304, vision],
            "mlp.fc2": [vision, 4304],
            "layer_norm1": [vision],
            "layer_norm2": [vision],
        }
        for name, shape in matrices.items():
            shapes |= {f"{base}{name}.weight": shape, f"{base}{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_size_in_every_layout(layout, capsys):
    tensor, expert, pipeline = map(str, layout)
    experts = "separate" if layout == (1, 16, 2) else "fused"
    arguments = ["--tp", tensor, "--ep", expert, "--pp", pipeline, "--experts", experts]
    shapes = lines(capsys, "keye_vl2_30b_a3b", *arguments)
    assert shapes == released(experts)
    assert sum(map(prod, shapes.values())) == TOTAL


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
