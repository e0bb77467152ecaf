"""The gate in front of sparse attention, and what the log says of the indexers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_keye.config.load import RECIPES, load_recipe
from megatron_keye.config.validate import validate
from megatron_keye.errors import UserError
from megatron_keye.model.health import PER_QUERY
from megatron_keye.parallel import plan
from megatron_keye.training.engine import Engine
from megatron_keye.training.health import Health, check_gate, metrics_of


@pytest.fixture
def one_process():
    plan.single_process()
    yield
    plan.shut_down()


def warm_up(folder: Path, **recalls: float) -> Path:
    """A run's log, `step10=0.5` a measurement -> the folder of its checkpoint at step 20."""
    rows: list[dict] = [{"iteration": i} for i in range(1, 31)]
    for step, recall in recalls.items():
        rows[int(step.removeprefix("step")) - 1] |= {
            "dsa/recall-mass": recall,
            "dsa/recall-mass-by-layer": [recall + 0.1, recall - 0.1],
        }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "checkpoints" / "iter_0000020"


@pytest.mark.usefixtures("one_process")
class TestGate:
    def test_open_for_a_recall_that_is_reached(self, tmp_path):
        check_gate(warm_up(tmp_path, step10=0.4, step20=0.81), 0.8)

    def test_shut_for_one_below_and_the_worst_layer_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"recall_gate = 0.8: at step 20 .* find 0.790 .*layer 2: 0.690"):
            check_gate(warm_up(tmp_path, step10=0.9, step20=0.79), 0.8)

    def test_what_came_after_the_checkpoint_does_not_count(self, tmp_path):
        with pytest.raises(UserError, match="at step 10"):
            check_gate(warm_up(tmp_path, step10=0.5, step30=0.9), 0.8)

    def test_shut_where_nothing_was_measured(self, tmp_path):
        with pytest.raises(UserError, match="holds no dsa/recall-mass up to step 20"):
            check_gate(warm_up(tmp_path), 0.1)
        (tmp_path / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match=r"metrics.jsonl holds no dsa/recall-mass"):
            check_gate(tmp_path / "checkpoints" / "iter_0000020", 0.1)

    def test_a_run_asks_before_it_reads_a_weight(self, tmp_path):
        recipe = load_recipe(RECIPES / "dsa_sparse.yaml", ["profile=mini", "training.recall_gate=0.3"])
        found = warm_up(tmp_path, step20=0.2)
        found.mkdir(parents=True)
        (found / "checksums.json").write_text("{}")
        recipe.training.init_from = str(found.parent)
        with pytest.raises(UserError, match=r"recall_gate = 0.3: at step 20 .* find 0.200"):
            Engine(recipe, plan.initialize(recipe.parallel))
        warm_up(tmp_path, step20=0.4)
        with pytest.raises(UserError, match=r"checksums\.json is damaged"):  # through the gate, to the weights
            Engine(recipe, plan.initialize(recipe.parallel))
        (tmp_path / "config.json").write_text("{}")
        recipe.training.init_from = str(tmp_path)
        with pytest.raises(UserError, match=r"recall_gate: the folder .* tells no recall"):
            Engine(recipe, plan.initialize(recipe.parallel))


@pytest.mark.parametrize(
    "recipe, override, message",
    [
        ("stage1", "training.recall_gate=0.5", "recall_gate = 0.5 asks what indexers have learnt, and attention_mode = 'dense'"),
        ("dsa_sparse", "training.recall_gate=1.5", "recall_gate = 1.5 is a share"),
        ("dsa_sparse", "training.recall_gate=0", "recall_gate = 0.* must be above 0"),
        ("dsa_sparse", "logging.dsa_health_interval=0", "dsa_health_interval = 0 must be 1 or more"),
    ],
)  # fmt: skip
def test_values(recipe, override, message):
    with pytest.raises(UserError, match=message):
        validate(load_recipe(RECIPES / f"{recipe}.yaml", ["profile=mini", override]), 1)


def test_when_it_is_measured():
    def steps(*overrides: str, recipe="dsa_warmup") -> list[int]:
        made = load_recipe(RECIPES / f"{recipe}.yaml", ["profile=mini", "training.steps=9", *overrides])
        health = Health(made, [])
        found = []
        for step in range(1, 10):
            health.before(step)
            found += [step] * health.due
        return found

    assert steps("logging.dsa_health_interval=4") == [4, 8, 9]
    assert steps("logging.dsa_health_interval=null") == []
    assert steps("logging.dsa_health_interval=4", recipe="stage1") == []


def test_sums_become_means_by_layer_and_group():
    groups, queries = 2, 16
    table = torch.zeros(3, 1 + len(PER_QUERY) + 2 * groups, dtype=torch.float64)
    table[:, 0] = queries
    for layer in range(3):
        table[layer, 1:] = queries * (layer + torch.arange(table.shape[1] - 1) / 100)
    found = metrics_of(table)
    assert found["dsa/probe-queries"] == queries
    assert found["dsa/recall-mass-by-layer"] == pytest.approx([0.0, 1.0, 2.0])
    assert found["dsa/recall-mass"] == pytest.approx(1.0) and found["dsa/recall-set"] == pytest.approx(1.01)
    first = len(PER_QUERY) / 100
    by_group = torch.tensor(found["dsa/recall-set-by-layer-and-group"])
    assert by_group.tolist()[0] == pytest.approx([first + 0.02, first + 0.03])
    assert json.loads(json.dumps(found)) == found
    assert metrics_of(torch.zeros_like(table)) == {"dsa/probe-queries": 0}
