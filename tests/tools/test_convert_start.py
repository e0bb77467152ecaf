"""A new Keye out of plain Qwen3-MoE as transformers writes it: every tensor comes from where the command says."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import megatron_keye.model as m
from megatron_keye.conversion.commands import export
from megatron_keye.errors import UserError
from megatron_keye.model.hf import exported
from megatron_keye.model.hf_files import Checkpoint
from megatron_keye.parallel import plan
from megatron_keye.parallel.plan import initialize
from megatron_keye.training.engine import Engine
from tests.parallel.trained import recipe_for, whole_tensors
from tests.tools.small_checkpoint import BF16, FP32, tensors, write
from tools.convert import main

RECIPE = Path(__file__).parents[2] / "recipes" / "stage0.yaml"
MINI = "profile=mini model.num_layers=2 model.vocab_size=512 model.image_token_id=510 model.video_token_id=511"


@pytest.fixture(autouse=True)
def _groups():
    yield
    plan.shut_down()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, rope_theta=1e6, max_position_embeddings=32_768,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen") / "hf"
    Qwen3MoeForCausalLM(config).to(BF16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def keye(tmp_path_factory) -> Path:
    """A Keye whose tower is taken. It also has SigLIP's pooling head, as some folders do."""
    folder = write(tmp_path_factory.mktemp("keye") / "hf", BF16)
    return edited(folder, folder.with_name("with-head"), {"visual.vision_model.head.probe": torch.zeros(1, 1, 64)})


def edited(folder: Path, path: Path, added: dict[str, torch.Tensor], **vision: object) -> Path:
    path.mkdir()
    save_file(tensors(folder) | added, path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= vision
    (path / "config.json").write_text(json.dumps(config))
    return path


def convert(arguments: str, out: Path, recipe: str = f"--recipe {RECIPE} {MINI}") -> dict[str, torch.Tensor]:
    """-> the tensors of the new model by canonical name"""
    assert main(shlex.split(f"import {arguments} --out {out / 'ckpt'} {recipe}")) == 0
    export(out / "ckpt", out / "back", say=lambda line: None)
    files = Checkpoint(out / "back")
    return {name: files.get(name) for name in files.names()}


def drawn(found: dict[str, torch.Tensor], seed: int) -> set[str]:
    """Those that equal what training draws in their type."""
    cfg = replace(recipe_for({}, "bf16").model, attention_mode="dense")
    expected = dict(exported(m.build_model(cfg, found["lm_head.weight"].dtype, seed)))
    return {name for name, tensor in found.items() if torch.equal(tensor, expected[name])}


def test_every_part_from_its_source(qwen, keye, tmp_path, capsys):
    found = convert(f"--hf {qwen} --vision-hf {keye} --indexers init --seed 7", tmp_path)
    said = capsys.readouterr().out
    for line in ("10 tensors of sa_indexer are drawn with seed 7", "1 tensors of its pooling head", "rope_theta is"):
        assert line in said
    language, tower = Checkpoint(qwen), Checkpoint(keye)
    indexers = {name for name in found if ".sa_indexer." in name}
    for name, tensor in found.items():
        assert tensor.dtype is BF16
        if name not in indexers:
            source = tower if name.startswith(("visual.", "mlp_AR.")) else language
            assert torch.equal(tensor, source.get(name)), name
    assert len(indexers) == 10 and indexers <= drawn(found, 7)
    assert not torch.equal(
        found["model.layers.0.self_attn.sa_indexer.q_proj.weight"],
        found["model.layers.1.self_attn.sa_indexer.q_proj.weight"],
    )
    recipe = recipe_for({}, "bf16", init_from=tmp_path / "ckpt")
    loaded = whole_tensors(Engine(recipe, initialize(recipe.parallel)))
    assert loaded.keys() == found.keys() and all(torch.equal(loaded[name], found[name]) for name in found)


def test_without_a_recipe_the_folders_say(qwen, keye, tmp_path, capsys):
    by_recipe = convert(f"--hf {qwen} --vision-hf {keye} --indexers init --seed 7", tmp_path / "a")
    by_folders = convert(f"--hf {qwen} --vision-hf {keye} --indexers init --seed 7", tmp_path / "b", recipe="")
    assert by_recipe.keys() == by_folders.keys()
    assert all(torch.equal(by_recipe[name], by_folders[name]) for name in by_recipe)
    assert "no recipe: indexers of 4 heads of 32, top-k 8" in capsys.readouterr().out
    model = json.loads((tmp_path / "b" / "ckpt" / "iter_0000000" / "model.json").read_text())
    assert (model["rope_theta"], model["vision_layers"], model["image_token_id"]) == (1e6, 2, 510)


def test_drawn_projector_and_drawn_tower(qwen, tmp_path):
    wide = m.build_model(m.build_config("keye_mini", num_layers=1, hidden_size=128, vocab_size=512,
                                        image_token_id=510, video_token_id=511), BF16, seed=99)  # fmt: skip
    m.to_hf(wide, tmp_path / "wide")  # as Keye-VL-1.5-8B: the same tower in front of a wider language model
    with pytest.raises(UserError, match=r"mlp_AR\.linear_2"):
        convert(f"--hf {qwen} --vision-hf {tmp_path / 'wide'} --indexers init", tmp_path)
    assert not (tmp_path / "ckpt").exists()

    found = convert(f"--hf {qwen} --vision-hf {tmp_path / 'wide'} --indexers init --projector init", tmp_path)
    tower = Checkpoint(tmp_path / "wide")
    mine = drawn(found, 1234)  # the recipe's seed
    for name in found:
        if name.startswith("visual."):
            assert torch.equal(found[name], tower.get(name)), name
        elif name.startswith("mlp_AR.") or ".sa_indexer." in name:
            assert name in mine, name

    found = convert(f"--hf {qwen} --vision init --indexers init --projector init --dtype fp32", tmp_path / "all")
    assert {tensor.dtype for tensor in found.values()} == {FP32}
    assert drawn(found, 1234) >= found.keys() - set(Checkpoint(qwen).names())
    language = Checkpoint(qwen)
    assert all(torch.equal(found[name], language.get(name).float()) for name in language.names())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--vision-hf KEYE", "give --indexers init"),
        ("--indexers init", "give either --vision-hf DIR or --vision init"),
        ("--indexers init --vision-hf KEYE --vision init", "give either --vision-hf DIR or --vision init"),
        ("--indexers init --vision init", "give --projector init too"),
        ("--seed 3", "give --indexers init"),
    ],
)
def test_nothing_is_drawn_unasked(qwen, keye, arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        convert(f"--hf {qwen} {arguments.replace('KEYE', str(keye))}", tmp_path, recipe="")


def test_what_does_not_fit_is_named(qwen, keye, tmp_path, capsys):
    both = f"--hf {qwen} --vision-hf {keye} --indexers init"
    with pytest.raises(UserError, match="num_layers is 2 there and 4 in the recipe"):
        convert(both, tmp_path, recipe=f"--recipe {RECIPE} profile=mini model.vocab_size=512")
    with pytest.raises(UserError, match="vision_layers is 2 there and 27 in the recipe"):
        convert(both, tmp_path, recipe=f"--recipe {RECIPE} {MINI} model.vision_layers=27")
    with pytest.raises(UserError, match="whole Keye"):
        convert(f"--hf {keye} --vision-hf {keye} --indexers init", tmp_path)
    other = edited(keye, tmp_path / "heads", {}, num_attention_heads=4)
    with pytest.raises(UserError, match="vision_heads is 4 there and 2 in the recipe"):
        convert(f"--hf {qwen} --vision-hf {other} --indexers init", tmp_path)
    (other / "config.json").unlink()
    convert(f"--hf {qwen} --vision-hf {other} --indexers init", tmp_path / "silent")
    assert "says nothing of the vision tower: its heads" in capsys.readouterr().out
    other = edited(keye, tmp_path / "more", {"visual.vision_model.encoder.layers.2.layer_norm1.bias": torch.zeros(64)})
    with pytest.raises(UserError, match=r"not part of this model \(first: visual\.vision_model\.encoder\.layers\.2"):
        convert(f"--hf {qwen} --vision-hf {other} --indexers init", tmp_path)
    with pytest.raises(UserError, match="overrides are of a recipe"):
        convert(both, tmp_path, recipe="model.num_layers=2")
    assert not (tmp_path / "ckpt").exists()
