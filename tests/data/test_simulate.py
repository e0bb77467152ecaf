"""The loader alone: its numbers are the loader's, its recipe is the trainer's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import keye_data.tokenizer
from keye_data.errors import DataError
from keye_data.loader import Loader
from keye_data.processor import Processor
from keye_data.recipe import read_recipe
from keye_data.shards import build_shards
from keye_data.simulate.__main__ import main
from megatron_keye.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if "\ndata:" in path.read_text())
RECIPE = """
name: tiny
data:
  tokenizer: {tokenizer}
  sources: [{{path: texts, weight: 3.0}}, {{path: films, kind: long}}]
  seq_length: 160
  packing_buffer: 8
  workers: 1
  image: {{max_tokens: 16}}
  video: {{min_frame_tokens: 4, max_frame_tokens: 6}}
training: {{micro_batch_size: 2, seed: 9}}
profiles:
  even: {{data: {{long_short_ratio: 1.0, workers: 0}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_clip, qwen_tiktoken) -> Path:
    """A recipe with two sources in paths relative to it: 10 documents, one too long, and 5 clips, one broken."""
    root = tmp_path_factory.mktemp("simulate")
    texts = [{"text": "word " * (300 if i == 4 else 5 + 9 * i)} for i in range(10)]
    films = []
    for i in range(5):
        clip = make_clip(4 + i, seed=i)
        (root / f"{i}.mp4").write_bytes(clip[:500] if i == 2 else clip)
        parts = [{"type": "video", "video": f"{i}.mp4"}]
        films.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]})
    for name, records in (("texts", texts), ("films", films)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        build_shards(root / f"{name}.jsonl", root / name, samples_per_shard=3)
    (root / "tiny.yaml").write_text(RECIPE.format(tokenizer=qwen_tiktoken))
    return root


@pytest.fixture
def read_tokenizer(monkeypatch, tokenizer):
    """The vocabulary is not read from its file again, which takes seconds; one test reads it."""
    read = keye_data.tokenizer.load_tokenizer
    monkeypatch.setattr(keye_data.tokenizer, "load_tokenizer", lambda path: tokenizer if path != "???" else read(path))


def test_numbers_are_those_of_the_loader(folder, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    main(["tiny.yaml", "profile=even", "--once", "--json", "n.json", "--png", "p.png", "--skipped", "s.jsonl"])
    numbers = json.loads((folder / "n.json").read_text())
    recipe = read_recipe(Path("tiny.yaml"), ["profile=even"])
    loader = Loader(
        recipe.data, Processor(tokenizer, recipe.data), rank=0, world_size=1, micro_batch_size=2, seed=9, repeat=False
    )
    batches = list(loader)
    loader.close()
    seen = sum(int((batch.key_stop > batch.key_start).sum()) for batch in batches)
    assert (numbers["samples"], numbers["tokens"]) == (13, seen)
    rows = sum(len(batch.input_ids) for batch in batches)
    assert numbers["rows"] == rows and numbers["fill"] == pytest.approx(seen / rows / 160)
    assert numbers["pictures"] == 0 and numbers["frames"] == sum(len(batch.grid) for batch in batches) > 0
    assert numbers["patches"] == sum(len(batch.patches) for batch in batches)
    assert numbers["skipped"] == {"too long": 1, "corrupt clip": 1}
    by_source = numbers["sources"]
    assert {name: (one["samples"], one["skipped"], one["epochs"]) for name, one in by_source.items()} == {
        "texts": (9, 1, 1.0),
        "films": (4, 1, 1.0),
    }
    assert by_source["texts"]["share"] == pytest.approx(9 / 13)
    assert numbers["memory_mib"]["main_peak"] > 50 and numbers["memory_mib"]["worker_peak"] == 0
    lines = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert sorted(line["reason"] for line in lines) == ["corrupt clip", "too long"]
    picture = Image.open("p.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors() or []) > 20
    printed = capsys.readouterr().out
    assert "13 samples" in printed and f"{numbers['fill']:.1%}" in printed
    assert all(line["message"] in " ".join(printed.split()) for line in lines)


def test_long_and_short_are_drawn_as_asked_and_workers_are_measured(folder, monkeypatch, read_tokenizer):
    monkeypatch.chdir(folder)
    shares = {}
    for words in ([], ["data.long_short_ratio=1.0"]):
        main(["tiny.yaml", *words, "data.packing=false", "--samples", "300", "--json", "n.json"])
        numbers = json.loads((folder / "n.json").read_text())
        assert numbers["memory_mib"]["worker_peak"] > 50 and numbers["samples_per_second"] > 0
        films = numbers["sources"]["films"]
        drawn = {name: one["samples"] + one["skipped"] for name, one in numbers["sources"].items()}
        assert films["epochs"] == pytest.approx(drawn["films"] / 5)
        shares[bool(words)] = drawn["films"] / sum(drawn.values())
    assert 0.19 < shares[False] < 0.31 and 0.44 < shares[True] < 0.56  # 1/4 and 1/2 expected, deviation 0.025 or more


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_means_the_same_to_trainer_and_loader(path):
    words = ["data.seq_length=512", "data.sources.0.weight=0.125", "data.video.fps=1", "data.system_prompt=Be: brief"]
    for overrides in ([], ["profile=mini"], ["profile=mini", *words, "training.seed=7"]):
        ours, theirs = read_recipe(path, overrides), load_recipe(path, overrides)
        assert ours.data == theirs.data and ours.name == theirs.name
        assert (ours.micro_batch_size, ours.seed) == (theirs.training.micro_batch_size, theirs.training.seed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "recipe none.yaml not found"),
        (["tiny.yaml", "profile=huge"], "no profile 'huge'; its profiles: even"),
        (["tiny.yaml", "data.wrokers=1"], "tiny.yaml: .*wrokers"),
        (["tiny.yaml", "data.workers=many"], "tiny.yaml: data.workers.*many"),
        (["tiny.yaml", "data.sources.7.weight=1"], "override 'data.sources.7.weight=1'"),
        (["tiny.yaml", "workers"], "'workers' is no override"),
        (["tiny.yaml", "data.tokenizer=???"], "data.tokenizer"),
        (["tiny.yaml", "data.too_long=drop"], "data.too_long: 'drop' is neither skip nor cut"),
        (["tiny.yaml", "data.sources.0.kind=tall"], "texts has kind 'tall'; it must be short or long"),
        (["tiny.yaml", "data.long_short_ratio=0"], "data.long_short_ratio = 0.0 must be above 0"),
        (["tiny.yaml", "data.long_short_ratio=2", "data.sources.1.kind=short"], "none has kind: long"),
        (["tiny.yaml", "data.sources.1.path=./texts"], "listed twice"),
        (["tiny.yaml", "--samples", "0"], "--samples 0"),
        (["tiny.yaml", "--png", "no/p.png"], "the folder no does not exist"),
    ],
)
def test_mistakes_are_named(folder, monkeypatch, read_tokenizer, words, message):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=message) as error:
        main(words)
    assert "\n" not in str(error.value)


def test_the_command(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "data_pipeline"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "keye_data.simulate"]
    begin = time.perf_counter()
    shown = subprocess.run([*command, "--help"], env=env, cwd=folder, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 3 and "--samples" in shown.stdout
    assert "python -m keye_data.simulate recipes/stage1.yaml profile=mini\n" in shown.stdout
    wrong = subprocess.run([*command, "none.yaml"], env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and wrong.stderr.strip() == "error: recipe none.yaml not found"
