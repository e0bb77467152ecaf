"""Every committed recipe loads, fits the ranks it states, and has a comment above every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_keye.config.load import RECIPES, load_recipe, save_resolved
from megatron_keye.config.validate import validate
from megatron_keye.config.yaml_io import load_yaml

PATHS = sorted(path for path in RECIPES.glob("*.yaml") if "\nmodel:" in path.read_text())  # a curriculum has no model
BY_NAME = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
# As published: tokens learnt from, context (where stated), vision tokens of a sample's clips, what learns, attention.
# The context of the two DSA phases is DeepSeek's, of the fine-tuning ours.
PUBLISHED = {
    "stage0": (4e9, 8192, None, "projector", "dense"),
    "stage1": (1e12, 32_768, 24_576, "all_but_indexers", "dense"),
    "stage2": (2e12, 65_536, 65_536, "all_but_indexers", "dense"),
    "dsa_warmup": (2e9, None, None, "indexers", "warmup"),
    "dsa_sparse": (None, None, None, "all", "sparse"),
    "stage3": (500e9, 262_144, 184_320, "all", "sparse"),
    "sft": (500e9, None, None, "all", "sparse"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_what_the_recipe_says(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    amount, context, video, scope, attention = PUBLISHED[name]
    tokens = recipe.training.steps * recipe.training.global_batch_size * recipe.data.seq_length
    assert amount is None or 1 <= tokens / amount < 1.1
    assert context in (None, recipe.data.seq_length)
    assert video in (None, recipe.data.video.total_tokens)
    assert (recipe.training.scope, recipe.model.attention_mode) == (scope, attention)
    assert recipe.model.attention_mode != "sparse" or recipe.model.topk == 2048
    assert recipe.model.rope_theta == 1e7 and recipe.model.max_position_embeddings == 262_144
    # budgets of a phase without shares by duration count in full
    assert recipe.data.video.adaptive_budget == (name in ("stage0", "stage3", "sft"))


@BY_NAME
@pytest.mark.parametrize("overrides", [[], ["profile=mini"]], ids=str)
def test_shares_of_the_sources_add_up(path, overrides):
    """Written as shares they can be read as shares: of all samples, or with a ratio of those of their kind."""
    data = load_recipe(path, overrides).data
    kinds = {source.kind for source in data.sources}
    assert kinds == ({"long", "short"} if data.long_short_ratio else {"short"})
    for kind in kinds:
        assert sum(source.weight for source in data.sources if source.kind == kind) == pytest.approx(1)
    assert data.long_short_ratio == (1.0 if path.stem == "stage3" else None)


@BY_NAME
def test_full_scale_fits_the_gpus_it_states(path):
    (gpus,) = re.findall(r"\((\d+) GPUs", path.read_text())
    ((nodes, per_node),) = re.findall(r"--nnodes (\d+) --nproc-per-node (\d+)", path.read_text())
    assert int(nodes) * int(per_node) == int(gpus)
    recipe = load_recipe(path)
    assert validate(recipe, int(gpus)) == []
    assert recipe.name == path.stem


@BY_NAME
@pytest.mark.parametrize(
    "world_size, overrides",
    [(1, []), (2, []), (4, [])]
    + [(n, [f"parallel.{kind}=2"]) for n in (2, 4) for kind in ("context", "expert", "pipeline")],
    ids=str,
)
def test_mini_fits_a_laptop(path, world_size, overrides):
    recipe = load_recipe(path, ["profile=mini", *overrides])
    assert validate(recipe, world_size) == []
    assert recipe.model.preset == "keye_mini"
    assert recipe.name == f"{path.stem}-mini"
    assert recipe.model.attention_mode != "sparse" or recipe.model.topk < recipe.data.seq_length


@BY_NAME
@pytest.mark.parametrize("overrides", [[], ["profile=mini"]], ids=str)
def test_resolved_is_the_same_recipe(path, overrides, tmp_path):
    recipe = load_recipe(path, overrides)
    save_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@BY_NAME
def test_the_mini_profile_holds_only_differences(path):
    data = load_yaml(path)
    mini = data.pop("profiles")["mini"]
    full = load_recipe(path)

    def same(block, values, prefix=""):
        for key, value in block.items():
            now = getattr(values, key)
            if isinstance(value, dict):
                yield from same(value, now, f"{prefix}{key}.")
            elif value == now:
                yield prefix + key

    assert list(same(mini, full)) == []


@BY_NAME
def test_phases_chain(path):
    """`init_from` of a phase is where another recipe's run keeps its checkpoints (the first start excepted)."""
    for overrides in ([], ["profile=mini"]):
        start = load_recipe(path, overrides).training.init_from
        if start in (None, "checkpoints/keye_vl2_init"):
            assert path.stem == "stage0"
            continue
        runs = {f"{load_recipe(other, overrides).run_dir}/checkpoints" for other in PATHS}
        assert start in runs


@BY_NAME
def test_every_key_has_a_comment_above(path: Path):
    lines = path.read_text().splitlines()
    bare = [
        f"line {i + 1}: {line.strip()}"
        for i, line in enumerate(lines)
        if re.match(r"\s*(- \{|[a-z_]+:)", line) and not lines[i - 1].lstrip().startswith("# ")
    ]
    assert bare == []
