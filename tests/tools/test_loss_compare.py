"""Where two runs part, found and told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.errors import UserError
from megatron_keye.parting import Tolerance, compare, read_run, relative

TOOL = Path(__file__).resolve().parents[2] / "tools" / "loss_compare.py"


def run(steps: int = 8, **changes) -> dict[int, dict]:
    """Losses that fall from 10; `changes`: by step, e.g. step3={"lm loss": 5.0}."""
    rows = {
        i: {"iteration": i, "lm loss": 10.0 / i, "indexer loss": 0.5, "sample-keys": [f"k{i}"]}
        for i in range(1, steps + 1)
    }
    for step, values in changes.items():
        rows[int(step.removeprefix("step"))] |= values
    return rows


def test_equal_runs_agree():
    found = compare(run(), run(steps=5), Tolerance())
    assert (found.steps, found.loss, found.data) == (5, None, None)
    assert found.greatest == {"lm loss": (0.0, 1), "indexer loss": (0.0, 1)}


@pytest.mark.parametrize(
    "step, factor, parts",
    [
        (5, 1 + 0.9e-4, False),
        (5, 1 + 1.2e-4, True),
        (6, 1 + 1.2e-4, False),
        (6, 1 + 0.9e-2, False),
        (6, 1 + 1.2e-2, True),
    ],
)
def test_the_bound_is_narrow_at_first_and_wide_after(step, factor, parts):
    other = run(**{f"step{step}": {"lm loss": 10.0 / step * factor}})
    found = compare(run(), other, Tolerance(early=1e-4, steps=5, late=1e-2))
    assert (found.loss is not None) == parts
    assert found.greatest["lm loss"] == (pytest.approx(factor - 1, rel=2e-2), step)
    if parts:
        assert (found.loss.step, found.loss.key) == (step, "lm loss")


def test_the_first_of_several_is_named_and_data_apart_from_losses():
    other = run(step3={"sample-keys": ["other"]}, step4={"indexer loss": 0.6}, step5={"lm loss": 9.0})
    found = compare(run(), other, Tolerance())
    assert (found.loss.step, found.loss.key, found.data.step) == (4, "indexer loss", 3)
    assert "the runs read other data" in str(found.data) and "['k3']" in str(found.data)


def test_a_step_that_was_not_finite():
    assert relative(None, None) == 0 and relative(None, 1.0) == float("inf")
    assert compare(run(step2={"lm loss": None}), run(), Tolerance()).loss.step == 2


def test_nothing_in_common(tmp_path):
    with pytest.raises(UserError, match="no step with a loss in common"):
        compare({1: run()[1]}, {2: run()[2]}, Tolerance())
    with pytest.raises(UserError, match=r"metrics.jsonl is not there"):
        read_run(tmp_path)


def test_a_line_cut_short_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(run()[1]) + '\n{"iteration": 2, "lm l')
    assert list(read_run(tmp_path)) == [1]


@pytest.mark.parametrize(
    "last, code, said", [(10 / 8, 0, "losses agree"), (2.0, 1, "losses part at step 8: lm loss 1.25 and 2.0")]
)
def test_command(tmp_path, last, code, said):
    for name, rows in (("a", run()), ("b", run(step8={"lm loss": last}))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout and "8 steps in both" in done.stdout
