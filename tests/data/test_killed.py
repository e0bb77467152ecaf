"""Loaders that are killed without warning: the restarted one goes on exactly behind the last checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from keye_data.loader import Loader
from keye_data.sample import Batch
from keye_data.settings import ImageConfig, SourceConfig
from keye_data.shards import build_shards
from tests.data.loading import TENSORS

LAST = 18  # batches of a whole run: several epochs of both sources
EVERY = 3  # batches between checkpoints
fork = multiprocessing.get_context("fork")  # the child has everything imported


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_clip) -> list[SourceConfig]:
    """24 clips and 24 documents, three and four of them bad."""
    root = tmp_path_factory.mktemp("killed")
    clips = [make_clip(4 + i, seed=i) for i in range(6)]
    films, texts = [], []
    for i in range(24):
        data = clips[i % 6]
        (root / f"{i}.mp4").write_bytes(data[: len(data) // 2] if i % 8 == 3 else data)
        parts = [{"type": "video", "video": f"{i}.mp4"}, {"type": "text", "text": "Say it."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"clip {i}"}]
        films.append({"messages": messages})
        texts.append({"text": f"Document {i}. " + "word " * (400 if i % 6 == 5 else 5 + 7 * i % 40)})
    for name, records in (("films", films), ("texts", texts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        build_shards(root / f"{name}.jsonl", root / name, samples_per_shard=6)
    return [SourceConfig(str(root / "films"), 2.0, "long"), SourceConfig(str(root / "texts"), 1.0)]


@pytest.fixture
def make(open_loader, sources):
    numbers = {"packing_buffer": 8, "shuffle_buffer": 6, "image": ImageConfig(4, 16), "micro_batch_size": 2}
    return partial(open_loader, *sources, long_short_ratio=1.0, **numbers)


def digest(batch: Batch) -> dict:
    """Which samples, which of their frames (as pixels: two frames of a clip differ), which tokens, what was skipped."""
    hashes = {name: hashlib.sha256(getattr(batch, name).numpy().tobytes()).hexdigest()[:16] for name in TENSORS}
    return {"keys": batch.keys, "bad": [[one.key, one.reason, one.masked] for one in batch.bad], **hashes}


def train(make, workers: int, log: Path, state: Path) -> None:
    """What a trainer does with its loader: goes on from the checkpoint, forgets what was logged after it, saves now and then."""
    loader = make(workers=workers)
    done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        loader.load_state_dict(saved["loader"])
        done = saved["done"]
    lines = log.read_text().splitlines()[:done] if log.exists() else []
    log.write_text("".join(f"{line}\n" for line in lines))
    with log.open("a") as stream:
        while done < LAST:
            stream.write(json.dumps(digest(next(loader))) + "\n")
            stream.flush()
            done += 1
            if done % EVERY == 0:
                torch.save({"loader": loader.state_dict(), "done": done}, state.with_suffix(".draft"))
                os.replace(state.with_suffix(".draft"), state)
    loader.close()


def lines_of(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []


@pytest.mark.parametrize(
    "workers",
    [0, pytest.param(2, marks=pytest.mark.slow)],  # seven loaders, each with processes that have to start
)
def test_the_sequence_goes_on_exactly_wherever_it_was_killed(make, tmp_path, workers):
    loader = make(workers=workers)
    want = [digest(next(loader)) for _ in range(LAST)]
    loader.close()
    assert sum(len(batch["bad"]) for batch in want) >= 4  # skipped ones are neither lost nor told twice
    assert len({key for batch in want for key in batch["keys"]}) < sum(len(batch["keys"]) for batch in want) / 1.5

    log, state = tmp_path / "log.jsonl", tmp_path / "state.pt"
    begun: list[int] = []
    orphans: list[psutil.Process] = []
    for stop in (1, EVERY, EVERY + 2, 2 * EVERY + 1, LAST - 2):  # before, at and behind checkpoints
        child = fork.Process(target=train, args=(make, workers, log, state))
        before = lines_of(log)
        child.start()
        deadline = time.monotonic() + 60
        while len(lines_of(log)) < stop or lines_of(log) == before:
            assert child.is_alive() and time.monotonic() < deadline, "it ended, or hangs, before it could be killed"
            time.sleep(0.002)
        orphans += psutil.Process(child.pid).children(recursive=True)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        begun.append(len(lines_of(log)))
    train(make, workers, log, state)
    assert [json.loads(line) for line in lines_of(log)] == want
    assert begun[0] < LAST and len(set(begun)) > 1  # it really was cut short, at different places
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert not alive, "workers outlive their trainer"


@pytest.mark.parametrize("stop", [3, 99])
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 2)), ((1, 2), (2, 1))])
def test_an_epoch_stays_whole_on_another_number_of_ranks(make, before, after, stop):
    """(ranks, workers) before and after a restart in the epoch, or behind its end: each sample used or skipped once."""
    found: list[str] = []

    def read(loader: Loader, count: int) -> None:
        for batch in itertools.islice(loader, count):
            found.extend([*batch.keys, *(one.key for one in batch.bad)])

    states = []
    for rank in range(before[0]):
        loader = make(rank=rank, world_size=before[0], workers=before[1], repeat=False)
        read(loader, stop // before[0] + 1)
        states.append(loader.state_dict())
        loader.close()
    assert (len(found) < 48) == (stop < 99)
    for rank in range(after[0]):
        loader = make(rank=rank, world_size=after[0], workers=after[1], repeat=False)
        loader.load_state_dict(states)
        read(loader, 100)
        loader.close()
    assert len(found) == len(set(found)) == 48
