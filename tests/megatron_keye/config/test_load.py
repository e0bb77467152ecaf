"""Recipes from YAML: the order of the layers, the errors, and the way back."""

from __future__ import annotations

import pytest

from megatron_keye.config.load import load_recipe, save_resolved
from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.errors import UserError

RECIPE = """
name: trial
model:
  topk: 512
data:
  tokenizer: tok
  sources:
    - {path: a, weight: 0.5}
    - {path: b}
training:
  steps: 100
  seed: 5
profiles:
  mini:
    model: {preset: keye_mini}
    training: {steps: 10}
    data: {sources: [{path: c}]}
  empty:
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "trial.yaml"
    file.write_text(RECIPE)
    return file


def test_layers_from_schema_to_override(path):
    plain = load_recipe(path)
    assert (plain.training.steps, plain.training.seed, plain.training.micro_batch_size) == (100, 5, 1)
    assert plain.run_dir == "runs/trial"
    assert [(s.path, s.weight) for s in plain.data.sources] == [("a", 0.5), ("b", 1.0)]

    mini = load_recipe(path, ["training.seed=6", "profile=mini"])
    assert (mini.training.steps, mini.training.seed) == (10, 6)
    assert [s.path for s in mini.data.sources] == ["c"]

    assert load_recipe(path, ["profile=mini", "training.steps=3"]).training.steps == 3
    assert (
        load_recipe(path, ["training.steps=3", "profile=mini"]).training.steps == 3
    )  # overrides win wherever they stand
    assert load_recipe(path, ["profile=empty"]) == plain


def test_preset_fills_only_what_nobody_set(path):
    assert load_recipe(path).model == build_config("keye_vl2_30b_a3b", topk=512)
    for overrides in (["profile=mini"], ["model.preset=keye_mini"]):
        assert load_recipe(path, overrides).model == build_config("keye_mini", topk=512)
    assert load_recipe(path, ["profile=mini", "model.topk=32"]).model == build_config("keye_mini", topk=32)
    back = load_recipe(path, ["profile=mini", "model.preset=keye_vl2_30b_a3b"])
    assert back.model == build_config("keye_vl2_30b_a3b", topk=512)


def test_values_of_overrides(path):
    recipe = load_recipe(
        path,
        [
            "data.sources.1.path=z",
            "optimizer.lr=1e-5",
            "name=007",
            "logging.wandb=off",
            "data.system_prompt=You are: kind",
            "checkpoint.interval=null",
            "model.mrope_section=[16,24,24]",
            "checkpoint.resume=false",
        ],
    )
    assert [s.path for s in recipe.data.sources] == ["a", "z"]
    assert recipe.optimizer.lr == 1e-5
    assert (recipe.name, recipe.run_dir) == ("007", "runs/007")
    assert recipe.logging.wandb == "off"
    assert recipe.data.system_prompt == "You are: kind"
    assert recipe.checkpoint.interval is None
    assert recipe.model.mrope_section == [16, 24, 24]
    assert recipe.checkpoint.resume is False


@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.topkk=3", ["override 'model.topkk=3'", "unknown key 'model.topkk'", "'model.topk'"]),
        ("topk=3", ["unknown key 'topk'", "'model.topk'"]),
        ("training.lr=3", ["unknown key 'training.lr'", "'optimizer.lr'"]),
        ("modle.topk=3", ["unknown key 'modle'", "'model'"]),
        ("data.sources.0.wieght=3", ["unknown key 'data.sources.0.wieght'", "'data.sources.0.weight'"]),
        ("data.sources.2.path=x", ["'data.sources' is a list", "0 to 1"]),
        ("data.sources.0.weight=x", ["data.sources.0.weight = 'x' is not a number"]),
        ("model.topk=many", ["model.topk = 'many' is not an integer"]),
        ("training.steps=1.5", ["training.steps = 1.5 is not an integer"]),
        ("training.steps=true", ["training.steps = True is not an integer"]),
        ("training.steps=null", ["training.steps = None is not an integer"]),
        ("checkpoint.resume=1", ["checkpoint.resume = 1 is not true or false"]),
        ("data.sources=5", ["data.sources = 5 is not a list"]),
        ("optimizer.lr={a: 1}", ["optimizer.lr = {'a': 1} is not a number"]),
        ("model=5", ["model = 5 is not a section"]),
        ("model.mrope_section=[1,x]", ["model.mrope_section.1 = 'x' is not an integer"]),
        ("model.preset=keye_min", ["model.preset = 'keye_min'", "'keye_mini'"]),
        ("name.x=1", ["'name' holds 'trial'"]),
        ("profile=mni", ["no profile 'mni'", "mini, empty"]),
        ("optimizer.lr=[1", ["optimizer.lr=[1", "not a valid YAML value"]),
        ("steps", ["'steps' is no override", "key=value"]),
        ("name=${oc.env:HOME}", ["only plain ${key} references"]),
        ("name=${nope}", ["name", "'nope' not found"]),
    ],
)
def test_bad_overrides(path, override, parts):
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("  topk: 512", "  tokp: 512", ["trial.yaml: unknown key 'model.tokp'", "'model.topk'"]),
        ("  topk: 512", "  topk: many", ["trial.yaml: model.topk = 'many' is not an integer"]),
        ("{steps: 10}", "{stesp: 10}", ["trial.yaml, profile 'mini'", "'training.stesp'", "'training.steps'"]),
        ("  steps: 100", "  steps: [100", ["trial.yaml, line ", "not valid YAML"]),
        ("  steps: 100", "  steps: 100\n  steps: 200", ["trial.yaml, line 12", "'steps' is given twice"]),
        ("name: trial", "name: !!python/object/apply:os.getcwd []", ["trial.yaml, line 2", "not valid YAML"]),
        ("  tokenizer: tok\n", "", ["data.tokenizer is not set"]),
        (RECIPE, "- a", ["a recipe is a mapping"]),
    ],
)
def test_bad_files(path, old, new, parts):
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    for part in parts:
        assert part in str(caught.value)


def test_a_fault_in_a_profile_not_chosen_is_reported(path):
    path.write_text(RECIPE.replace("{steps: 10}", "{stesp: 10}"))
    with pytest.raises(UserError, match=r"profile 'mini'.*training\.steps"):
        load_recipe(path, ["profile=empty"])


def test_missing_recipe_names_those_nearby(path):
    with pytest.raises(UserError, match=r"trail\.yaml not found; .* holds trial \(nearest: .*trial\.yaml\)"):
        load_recipe(path.with_name("trail.yaml"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["profile=mini"],
        ["data.system_prompt=a literal \\${name} and \\${oc.env:HOME}"],
        ["data.system_prompt=two lines\\n: # 'quoted' \"too\""],
        ["name=1e-4"],
        ["name=off"],
        ["optimizer.eps=1e-12", "checkpoint.interval=null", "model.mrope_section=[24,20,20]"],
    ],
)
def test_resolved_recipe_loads_to_the_same_object(path, overrides, tmp_path):
    recipe = load_recipe(path, overrides)
    save_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_a_literal_reference_stays_literal(path):
    assert load_recipe(path, ["data.system_prompt=\\${name}"]).data.system_prompt == "${name}"


def test_build_config():
    assert build_config("keye_vl2_30b_a3b") == ModelConfig()
    mini = build_config("keye_mini", topk=16, attention_mode="sparse")
    assert (mini.preset, mini.topk, mini.hidden_size, mini.attention_mode) == ("keye_mini", 16, 64, "sparse")
    with pytest.raises(UserError, match=r"unknown key 'topkk'.*'topk'"):
        build_config("keye_mini", topkk=16)
    with pytest.raises(UserError, match=r"topk = '16' is not an integer"):
        build_config("keye_mini", topk="16")
    with pytest.raises(UserError, match=r"'keye_maxi'.*'keye_mini'"):
        build_config("keye_maxi")
