"""The curriculum: what it would run, what it takes for done, and a real one, stopped in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from training_runs import REPOSITORY, metrics

from megatron_keye.config.curriculum import load_curriculum
from megatron_keye.curriculum import command, finished_phases
from megatron_keye.curriculum import main as run_curriculum
from megatron_keye.errors import UserError

FILE = REPOSITORY / "recipes" / "curriculum.yaml"
MINI = "profile=mini"
ORDER = ["stage0", "stage1", "stage2", "dsa_warmup", "dsa_sparse", "stage3", "sft"]


def test_real_scale_is_what_the_recipes_state():
    config, phases = load_curriculum(FILE, [])
    assert [phase.name for phase in phases] == ORDER
    for phase in phases:
        assert phase.warnings == []
        stated = (REPOSITORY / "recipes" / f"{phase.name}.yaml").read_text()
        assert f"({phase.nodes * config.ranks} GPUs" in stated and f"--nnodes {phase.nodes} " in stated
        assert str(phase.nodes) in command(config, phase)


def test_each_phase_begins_where_the_last_one_ends(tmp_path):
    _, phases = load_curriculum(FILE, [MINI, f"root={tmp_path}"])
    assert [phase.recipe.run_dir for phase in phases] == [f"{tmp_path}/{name}-mini" for name in ORDER]
    assert [phase.recipe.training.init_from for phase in phases] == [None, *(str(p.checkpoints) for p in phases[:-1])]


def test_recipes_chain_as_the_curriculum_does():
    """Started by hand, one after another, the recipes read the same checkpoints."""
    from megatron_keye.config.load import load_recipe

    for overrides in ([], [MINI]):
        for phase in load_curriculum(FILE, overrides)[1]:
            alone = load_recipe(FILE.with_name(f"{phase.name}.yaml"), overrides)
            assert alone == phase.recipe


def test_overrides_reach_one_phase_or_all():
    _, phases = load_curriculum(
        FILE, [MINI, "all.checkpoint.keep=1", "stage1.training.steps=70", "stage1.checkpoint.keep=4"]
    )
    assert [phase.recipe.checkpoint.keep for phase in phases] == [1, 4, 1, 1, 1, 1, 1]
    assert [phase.recipe.training.steps == 70 for phase in phases] == [name == "stage1" for name in ORDER]
    assert "training.steps=70" in phases[1].words and "training.steps=70" not in phases[2].words


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["stage9.training.steps=3"], "unknown key 'stage9'"),
        (["stage1.training.stesp=3"], "unknown key 'training.stesp'.*'training.steps'"),
        (["all.parallel.tensor=3"], "^stage0: parallel.tensor = 3"),
        (["nodes=0"], "nodes = 0 must be 1 or more"),
        (["phases=[]"], "phases is empty"),
        (["phases.1.recipe=stage9"], "stage9.yaml not found"),
        (["profile=maxi"], "no profile 'maxi'; its profiles: mini"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(overrides, message):
    with pytest.raises(UserError, match=message):
        load_curriculum(FILE, [*([] if "profile=maxi" in overrides else [MINI]), *overrides])


def test_a_launcher_that_cannot_be_filled_in():
    config, phases = load_curriculum(FILE, [MINI, "launch=srun {gpus}"])
    with pytest.raises(UserError, match=r"launch = 'srun \{gpus\}' .* nodes, ranks and host"):
        command(config, phases[0])


def reach(phase, step: int) -> None:
    """As if a run had published a checkpoint there."""
    folder = phase.checkpoints / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text("{}")


def test_finished_phases_are_skipped_and_a_broken_chain_is_refused(tmp_path):
    _, phases = load_curriculum(FILE, [MINI, f"root={tmp_path}", "all.training.steps=20"])
    assert finished_phases(phases) == 0
    reach(phases[0], 20)
    reach(phases[1], 10)
    assert finished_phases(phases) == 1
    reach(phases[2], 20)
    with pytest.raises(
        UserError, match=r"stage2-mini has been trained to step 20 .*stage1-mini is at step 10 of 20; remove"
    ):
        finished_phases(phases)
    for phase in (phases[1], *phases[3:]):
        reach(phase, 20)
    assert finished_phases(phases) == len(phases)


def test_dry_run_prints_commands_and_runs_nothing(tmp_path, capsys):
    assert run_curriculum([str(FILE), MINI, f"root={tmp_path}/runs", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("torchrun --standalone --nproc-per-node 2 -m megatron_keye.train") == len(ORDER)
    assert not (tmp_path / "runs").exists()


SMALL = [
    "all.data.seq_length=256", "all.training.steps=4", "all.training.global_batch_size=2", "all.optimizer.warmup_steps=0",
    "all.optimizer.schedule=constant", "all.optimizer.decay_steps=null", "all.checkpoint.interval=1", "all.checkpoint.keep=1",
    "all.logging.wandb=off", "all.logging.plot=false", "phases=[{recipe: stage0}, {recipe: dsa_warmup}, {recipe: dsa_sparse}]",
    "launch=python", "ranks=1", "all.model.topk=8", "dsa_sparse.training.recall_gate=0.02",
]  # fmt: skip


@pytest.mark.slow  # three phases in processes of their own, one of them twice
def test_stopped_in_the_middle_it_goes_on(clip_shards, qwen_tiktoken, tmp_path):
    where = [f"root={tmp_path}", f"all.data.tokenizer={qwen_tiktoken}", f"all.data.sources=[{{path: {clip_shards}}}]"]
    words = [sys.executable, "-m", "megatron_keye.curriculum", str(FILE), MINI, *SMALL, *where]
    path = os.pathsep.join(str(REPOSITORY / p) for p in (".", "kernels", "data_pipeline"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    stopped = start()
    second = tmp_path / "dsa_warmup-mini"
    while stopped.poll() is None and not list(second.glob("checkpoints/iter_*")):
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    text, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, text
    assert "stopped by SIGTERM, its newest checkpoint at step" in text
    assert not (tmp_path / "dsa_sparse-mini").exists()
    seen = len(metrics(second))
    assert 1 <= seen < 4, "stopped too late for anything to be left"
    first = (tmp_path / "stage0-mini" / "metrics.jsonl").read_bytes()

    again = start()
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text
    assert "phase 1 of 3: stage0" in text and "finished, skipped" in text and "going on from" in text
    assert (tmp_path / "stage0-mini" / "metrics.jsonl").read_bytes() == first
    for name in ("dsa_warmup-mini", "dsa_sparse-mini"):
        assert [row["iteration"] for row in metrics(tmp_path / name)] == [1, 2, 3, 4]
    table = text[text.index("Phases") :]
    tokens = sum(row["tokens"] for row in metrics(second))
    (line,) = [line for line in table.splitlines() if "dsa_warmup" in line]
    assert f"{tokens:,}" in line and " 4 " in line
    assert "indexer KL" in table and "recall" in table
