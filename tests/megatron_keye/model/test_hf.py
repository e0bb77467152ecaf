"""Hugging Face folders: what goes in comes out bit for bit, in both layouts of the experts, whatever the ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_keye.model as m
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.errors import UserError
from megatron_keye.model.hf import load_hf
from megatron_keye.model.init import initialize_weights
from megatron_keye.model.keye import VisionTower
from megatron_keye.model.language import LanguageModel
from megatron_keye.model.transformer_config import language_config, vision_config
from megatron_keye.parallel import plan
from tests.parallel.launch import launch

SMALL = dict(vocab_size=512, image_token_id=510, video_token_id=511, num_layers=2, vision_packing_positions=8)
CFG = m.build_config("keye_mini", attention_mode="sparse", **SMALL)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def model() -> m.KeyeModel:
    built = m.build_model(CFG, torch.float32)
    with torch.no_grad():  # norms and biases start alike; here every tensor is told from every other
        for i, parameter in enumerate(built.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "keye"
    m.to_hf(model, path)
    return path


def edited(folder: Path, path: Path, edit) -> Path:
    """A copy of a folder of one shard, its tensors changed by `edit`."""
    path.mkdir()
    tensors = stored(folder)
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", ["fused", "separate"])
def test_round_trip(model, tmp_path, experts, dtype):
    before = m.KeyeModel(CFG, dtype)
    before.load_state_dict(model.state_dict())
    m.to_hf(before, tmp_path / "a", experts=experts)
    after = m.from_hf(tmp_path / "a")
    assert not after.training
    assert replace(after.cfg, preset="keye_mini") == CFG
    expected = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert parameter.dtype is dtype
        assert torch.equal(parameter, expected[name]), name
    m.to_hf(after, tmp_path / "b", experts=experts)
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layouts_of_experts(model, folder, tmp_path):
    """Against slices written out by hand: Megatron's matrix is gate rows, then up rows."""
    m.to_hf(model, tmp_path / "separate", experts="separate")
    fused, separate = stored(folder), stored(tmp_path / "separate")
    experts = model.language_model.decoder.layers[1].mlp.experts.local_experts
    base, ffn = "model.layers.1.mlp.experts.", CFG.moe_ffn_hidden_size
    assert fused[base + "gate_up_proj"].shape == (CFG.num_experts, CFG.hidden_size, 2 * ffn)
    assert fused[base + "down_proj"].shape == (CFG.num_experts, ffn, CFG.hidden_size)
    for e, expert in enumerate(experts):
        both = expert.linear_fc1.weight
        assert torch.equal(separate[f"{base}{e}.gate_proj.weight"], both[:ffn])
        assert torch.equal(separate[f"{base}{e}.up_proj.weight"], both[ffn:])
        assert torch.equal(fused[base + "gate_up_proj"][e], both.T)
        assert torch.equal(fused[base + "down_proj"][e], expert.linear_fc2.weight.T)
        assert torch.equal(separate[f"{base}{e}.down_proj.weight"], expert.linear_fc2.weight)
    rest = {name for name in separate if ".experts." not in name}
    assert rest == {name for name in fused if ".experts." not in name}


def test_query_rows_are_in_head_order(model, folder):
    """Megatron keeps two query heads, a key head and a value head for each of two groups."""
    dim = CFG.head_dim
    qkv = model.language_model.decoder.layers[0].self_attention.linear_qkv.weight.unflatten(0, (8, dim))
    tensors = stored(folder)
    for part, heads in {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}.items():
        assert torch.equal(tensors[f"model.layers.0.self_attn.{part}_proj.weight"], qkv[heads].flatten(0, 1))


def test_folder(folder):
    assert sorted(f.name for f in folder.iterdir() if f.suffix != ".py") == [
        "config.json", "generation_config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert {f.name for f in folder.glob("*.py")} == {
        f"{name}_keye_vl2.py"
        for name in ("attention", "configuration", "generation", "modeling", "positions", "vision")
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "KeyeVL2"
    assert config["architectures"] == ["KeyeVL2MoeForConditionalGeneration"]
    assert config["sa_config"]["topk"] == CFG.topk
    assert config["rope_scaling"]["mrope_section"] == [8, 12, 12]


def test_tokenizer_goes_along(model, tmp_path, qwen_tiktoken):
    m.to_hf(model, tmp_path / "hf", tokenizer=qwen_tiktoken)
    names = {f.name for f in (tmp_path / "hf").iterdir()}
    wanted = "tokenizer.json chat_template.jinja preprocessor_config.json video_preprocessor_config.json config.json"
    assert names >= set(wanted.split())


def test_overrides_and_dtype(model, folder):
    after = m.from_hf(folder, dtype=torch.bfloat16, attention_mode="dense", topk=5)
    assert (after.cfg.attention_mode, after.cfg.topk) == ("dense", 5)
    weight = after.language_model.output_layer.weight
    assert torch.equal(weight, model.language_model.output_layer.weight.bfloat16())


def test_missing_and_extra_tensors_are_named(folder, tmp_path):
    def edit(tensors):
        del tensors["model.layers.1.self_attn.sa_indexer.k_norm.bias"], tensors["mlp_AR.linear_2.bias"]
        tensors["model.layers.0.mlp.shared_expert.weight"] = torch.zeros(1)

    with pytest.raises(UserError) as caught:
        m.from_hf(edited(folder, tmp_path / "x", edit))
    assert "2 tensors missing (first: model.layers.1.self_attn.sa_indexer.k_norm.bias)" in str(caught.value)
    assert "1 tensors not part of this model (first: model.layers.0.mlp.shared_expert.weight)" in str(caught.value)


def test_wrong_shapes_are_named(folder, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(7, 64)

    with pytest.raises(UserError, match=r"gate.weight has shape \[7, 64\], the configuration wants \[8, 64\]"):
        m.from_hf(edited(folder, tmp_path / "x", edit))
    with pytest.raises(UserError, match=r"tensors missing.*model\.layers\.2"):
        m.from_hf(folder, num_layers=3)


def test_mixed_dtypes_need_a_choice(folder, tmp_path):
    path = edited(folder, tmp_path / "x", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))
    with pytest.raises(UserError, match=r"model.norm.weight is torch.bfloat16.*choose"):
        m.from_hf(path)
    assert m.from_hf(path, dtype=torch.float32).language_model.decoder.final_layernorm.weight.dtype is torch.float32


def test_never_over_something_else(model, folder):
    before = stored(folder)
    with pytest.raises(UserError, match="not empty"):
        m.to_hf(model, folder)
    assert stored(folder).keys() == before.keys()


def _load_and_compare(folder: str, parallel: ParallelConfig) -> int:
    """Parameters of this rank, all equal to the ones drawn from the same seed in this layout."""
    groups = plan.initialize(parallel)
    config = language_config(CFG, parallel)
    models = []
    for _ in range(2):
        models.append([LanguageModel(config), VisionTower(vision_config(CFG), groups.vision)])
    load_hf(folder, CFG, models[0][:1], models[0][1])
    initialize_weights(models[1], CFG, seed=3)
    count = 0
    for loaded, drawn in zip(*models):
        for (name, a), (_, b) in zip(loaded.named_parameters(), drawn.named_parameters(), strict=True):
            assert torch.equal(a, b), name
            count += a.numel()
    return count


def _load_short(folder: str, parallel: ParallelConfig) -> str:
    plan.initialize(parallel)
    with pytest.raises(UserError) as caught:
        load_hf(folder, CFG, [LanguageModel(language_config(CFG, parallel))], None)
    return str(caught.value)


def test_load_over_ranks(tmp_path):
    whole = m.build_model(CFG, seed=3)
    m.to_hf(whole, tmp_path / "hf")
    total = sum(p.numel() for p in whole.parameters())
    for parallel in (ParallelConfig(tensor=2, expert_tensor=2), ParallelConfig(expert=2), ParallelConfig(pipeline=2)):
        counts = launch(_load_and_compare, 2, str(tmp_path / "hf"), parallel)
        assert max(counts) < total < sum(counts)
    # A language model alone leaves the tower's tensors over; every rank must say the same and none may wait.
    said = launch(_load_short, 2, str(tmp_path / "hf"), ParallelConfig(pipeline=2))
    assert said[0] == said[1]
    assert "not part of this model (first: visual.vision_model." in said[0]
