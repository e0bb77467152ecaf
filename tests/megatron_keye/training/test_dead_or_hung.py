"""A dead rank or a hung collective ends every rank within the timeout, with one message; then the run goes on."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from training_runs import command, finish, metrics, start

TIMEOUT = 20.0  # seconds; the ranks share two cores with each other, the loader and whoever else is here
OPTIONS = ("training.steps=6", "checkpoint.interval=2", "checkpoint.keep=9", f"training.collective_timeout_minutes={TIMEOUT / 60}")  # fmt: skip


def wait_for_step(process, run_dir: Path, step: int) -> None:
    log = run_dir / "metrics.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < step):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]


def rank_processes(process) -> list[psutil.Process]:
    ranks = [p for p in psutil.Process(process.pid).children() if "megatron_keye.train" in " ".join(p.cmdline())]
    return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))


def the_message(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1, text
    assert text.count("Traceback") == 1, "torchrun's own, after ours"
    return lines[0]


@pytest.mark.slow  # two runs of two ranks through torchrun
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, *OPTIONS, ranks=2)
    process = start(words)
    wait_for_step(process, tmp_path / "run", 3)
    rank_processes(process)[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, text = finish(process)
    assert code != 0
    assert time.monotonic() - began < TIMEOUT
    assert re.search(
        r"step [3-6]: \w+ over ranks 0, 1 failed .*: rank 1 is dead or stopped \(last heard of in step [3-6]",
        the_message(text),
    )

    code, text = finish(start(words))
    assert code == 0, text
    assert re.search(r"going on from .*iter_000000[24]", text)
    assert [m["iteration"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


HANGING = """
import os, time
from megatron_keye.training.feed import BlockFeed
from megatron_keye import train
from megatron_keye.cli import run_cli

take, steps = BlockFeed.take, []

def stuck(self, count):
    steps.append(count)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        print(f"\\nstuck at {time.time()}", flush=True)
        time.sleep(600)
    return take(self, count)

BlockFeed.take = stuck
if __name__ == "__main__":
    run_cli(train.main)
"""


@pytest.mark.slow  # a run of two ranks through torchrun
def test_a_hung_collective_ends_the_job_in_time(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    """Rank 1 stays behind in its third step, as a reader would that waits for a dead file server."""
    script = tmp_path / "megatron_keye" / "hanging.py"  # in a folder whose name marks code of ours
    script.parent.mkdir()
    script.write_text(HANGING)
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, *OPTIONS, ranks=2)
    at = words.index("megatron_keye.train")
    process = start([*words[: at - 1], str(script), *words[at + 1 :]])
    code, text = finish(process)
    ended = time.time()
    assert code != 0
    message = the_message(text)
    assert re.search(r"step 3: all_gather over ranks 0, 1 has hung for \d+ s: rank 1 is not in it", message)
    assert "last heard of in step 3 at megatron_keye/hanging.py:" in message
    assert ended - float(re.search(r"stuck at ([\d.]+)", text)[1]) < TIMEOUT


@pytest.mark.slow  # a run of two ranks through torchrun
def test_a_stopped_rank_ends_the_job_in_time(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    """The other waits for a coalesced exchange of gradients; torchrun alone would give the stopped one half a minute more."""
    script = tmp_path / "stopping.py"
    stop = "import signal; os.kill(os.getpid(), signal.SIGSTOP)"
    encode = "from megatron_keye.parallel.vision import VisionStep as BlockFeed"
    text = HANGING.replace("time.sleep(600)", stop).replace(".take", ".encode")
    script.write_text(text.replace("from megatron_keye.training.feed import BlockFeed", encode))
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, *OPTIONS, ranks=2)
    at = words.index("megatron_keye.train")
    code, text = finish(start([*words[: at - 1], str(script), *words[at + 1 :]]))
    ended = time.time()
    assert code != 0
    assert re.search(r"step 3: \w+ over ranks 0, 1 has hung for \d+ s: rank 1 is dead or stopped", the_message(text)), (
        text
    )
    assert ended - float(re.search(r"stuck at ([\d.]+)", text)[1]) < TIMEOUT


@pytest.mark.slow  # a run of two ranks through torchrun
def test_a_fault_of_one_rank_is_named_once(clip_shards: Path, qwen_tiktoken: Path, tmp_path: Path):
    script = tmp_path / "failing.py"
    script.write_text(HANGING.replace("time.sleep(600)", "raise ZeroDivisionError('a fault of the program')"))
    words = command(tmp_path / "run", clip_shards, qwen_tiktoken, *OPTIONS, ranks=2)
    at = words.index("megatron_keye.train")
    code, text = finish(start([*words[: at - 1], str(script), *words[at + 1 :]]))
    assert code != 0
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1, text
    assert "rank 1 failed (ZeroDivisionError: a fault of the program)" in lines[0]
    assert "in stuck\n" in text, "and its own traceback tells more"
