"""config.json both ways, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.errors import UserError
from megatron_keye.model.hf_config import config_dict, read_config, write_config

CASES = {
    "full": build_config("keye_vl2_30b_a3b", attention_mode="sparse"),
    "mini": build_config("keye_mini", attention_mode="sparse"),
    "interleaved": build_config("keye_mini", attention_mode="sparse", mrope_layout="interleaved", rope_theta=5e6),
    "sections": build_config("keye_mini", attention_mode="sparse", mrope_section=[16, 8, 8], vision_layers=1),
    "plain": build_config("keye_mini", vision_layers=0, indexer_heads=0, mrope_section=[30, 1, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
    cfg = CASES[name]
    write_config(cfg, tmp_path, "bfloat16")
    back = read_config(tmp_path)
    if name == "plain":  # the parts that are absent have no place in the file
        same = ("num_layers", "hidden_size", "head_dim", "num_experts", "vocab_size", "rope_theta", "mrope_section")
        assert all(getattr(back, key) == getattr(cfg, key) for key in same)
        assert (back.attention_mode, back.vision_layers, back.indexer_heads) == ("dense", 0, 0)
    else:
        assert replace(back, preset=cfg.preset) == cfg


def test_the_released_keys():
    config = config_dict(ModelConfig(), "bfloat16")
    assert config["sa_config"] == {
        "indexer_head_dim": 64, "indexer_num_heads": 16, "indexer_num_kv_heads": 1,
        "topk": 2048, "q_chunk_size": 512, "kv_chunk_size": 512,
    }  # fmt: skip
    assert config["rope_scaling"]["mrope_section"] == [16, 24, 24]
    assert config["vision_config"]["num_hidden_layers"] == 27
    assert config["num_key_value_heads"] == 4
    assert config["eos_token_id"] == 151_645
    assert (config["image_token_id"], config["video_token_id"]) == (151_655, 151_656)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(model_type="llama"), r"model_type 'llama' is neither KeyeVL2 nor qwen3_moe"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.pop("num_key_value_heads"), "num_key_value_heads is missing"),
        (lambda c: c.pop("num_experts"), "num_experts is missing"),
        (lambda c: c.pop("sa_config"), "sa_config is missing"),
        (lambda c: c["sa_config"].pop("topk"), r"sa_config\.topk is missing"),
        (lambda c: c["vision_config"].update(hidden_size=-4), r"vision_config\.hidden_size = -4"),
        (lambda c: c.update(num_hidden_layers="many"), "num_hidden_layers = 'many'"),
        (lambda c: c.update(num_hidden_layers=2.5), "num_layers"),
        (lambda c: c.update(num_attention_heads=3), "num_query_groups = 2 does not divide"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings = True is not supported"),
        (lambda c: c.update(norm_topk_prob=False), "norm_topk_prob = False is not supported"),
        (lambda c: c.update(mlp_only_layers=[0]), "mlp_only_layers"),
        (lambda c: c.update(rope_scaling={"rope_type": "yarn"}), "'yarn' are not supported"),
        (lambda c: c.update(rope_scaling="yarn"), "'yarn' is no mapping"),
        (lambda c: c["rope_scaling"].update(rope_type=["yarn"]), "yarn.* are not supported"),
        (lambda c: c["vision_config"].update(image_size="384"), "image_size = '384' is no whole number"),
        (lambda c: c["rope_scaling"].pop("mrope_section"), "mrope_section is missing"),
        (lambda c: c.pop("rope_theta"), "rope_theta is missing"),
    ],
)
def test_what_is_refused(tmp_path, edit, said):
    config = config_dict(CASES["mini"], "float32")
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_no_configuration(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="a mapping, not list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        read_config(tmp_path)


def test_an_unknown_override_names_the_nearest(tmp_path):
    write_config(CASES["mini"], tmp_path, "float32")
    with pytest.raises(UserError, match=r"top_k.*topk"):
        read_config(tmp_path, top_k=3)
