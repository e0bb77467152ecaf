"""Batches made ahead by a thread: the same, in the same order, with the same place to go on from, and gone when closed."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time

import pytest

from keye_data.errors import DataError
from keye_data.loader import Loader
from keye_data.prefetch import Prefetch
from keye_data.settings import VideoConfig
from keye_data.shards import build_shards
from tests.data.loading import same


class Maker:
    """Numbers from 0; each takes `seconds`; errors[n] is raised in place of n."""

    def __init__(self, seconds: float = 0.0, errors: dict[int, Exception] | None = None) -> None:
        self.seconds, self.errors, self.count = seconds, errors or {}, 0
        self.threads: set[str] = set()

    def make(self) -> int:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        number, self.count = self.count, self.count + 1
        if number in self.errors:
            raise self.errors[number]
        return number


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_order_and_bound(ahead):
    maker = Maker()
    items = Prefetch(maker.make, ahead)
    assert [next(items) for _ in range(20)] == list(range(20))
    assert wait_until(lambda: maker.count == 20 + ahead)
    time.sleep(0.05)
    assert maker.count == 20 + ahead  # never more than `ahead` wait
    assert items.close() and not threads()
    assert maker.threads == ({"MainThread", "prefetch"} if ahead else {"MainThread"})


def test_a_negative_number_is_refused():
    with pytest.raises(DataError, match=r"data\.prefetch: -1"):
        Prefetch(Maker().make, -1)


@pytest.mark.parametrize("ahead", [0, 2])
def test_errors_come_where_they_were_raised_and_work_goes_on_behind_them(ahead):
    maker = Maker(errors={3: DataError("third"), 5: StopIteration()})
    items, seen = Prefetch(maker.make, ahead), []
    for _ in range(8):
        try:
            seen.append(next(items))
        except (DataError, StopIteration) as error:
            seen.append(type(error).__name__)
    assert seen == [0, 1, 2, "DataError", 4, "StopIteration", 6, 7]
    assert items.close() and not threads()


def test_the_wait_is_what_the_consumer_leaves_over():
    """Making takes 40 ms, using 120 ms: ahead, next to nothing is left to wait for; without, all of it."""

    def waited(ahead: int) -> float:
        maker, total = Maker(0.04), 0.0
        items = Prefetch(maker.make, ahead)
        next(items)
        for _ in range(6):
            time.sleep(0.12)  # the step
            begin = time.perf_counter()
            next(items)
            total += time.perf_counter() - begin
        items.close()
        return total

    assert waited(0) >= 6 * 0.04
    assert waited(2) < 6 * 0.04 / 2


def test_nobody_who_forgets_to_close_leaves_a_thread():
    maker = Maker()
    items = Prefetch(maker.make, 2)
    next(items), next(items)
    assert threads()
    del items
    gc.collect()
    assert wait_until(lambda: not threads())
    items = Prefetch(maker.make, 2)
    next(items), next(items)
    del maker  # the owner is gone: there is nothing to call any more
    gc.collect()
    items.close()
    assert not threads()


def test_a_signal_reaches_the_handler_while_a_batch_is_waited_for():
    maker = Maker()
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(maker.count))
    items = Prefetch(maker.make, 1)
    try:
        next(items), next(items), next(items)
        assert wait_until(lambda: maker.count == 4)  # one waits
        maker.seconds = 1.0
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert [next(items) for _ in range(3)] == [3, 4, 5]
    finally:
        signal.signal(signal.SIGTERM, before)
        items.close()
    assert got == [4], "while the fifth was being made"


# ---- the loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_clip):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(make_clip(8 + i, height=128, width=128, seed=i))
    turns = []
    for i in range(8):
        question = {"role": "user", "content": [{"type": "video", "video": f"{i}.mp4"}]}
        turns.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"clip {i}"}]}))
    (folder / "data.jsonl").write_text("\n".join(turns))
    build_shards(folder / "data.jsonl", folder / "shards", samples_per_shard=2)
    return folder / "shards"


@pytest.fixture
def make_loader(open_loader, shards):
    def make(prefetch: int, workers: int = 0, **changes) -> Loader:
        video = VideoConfig(min_frame_tokens=4, max_frame_tokens=8, **changes)
        return open_loader(shards, seq_length=256, workers=workers, prefetch=prefetch, video=video)

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_places_are_those_without_it(make_loader, workers):
    plain, ahead = make_loader(0, workers), make_loader(3, workers)
    want = [next(plain) for _ in range(12)]
    got = [next(ahead) for _ in range(5)]
    time.sleep(0.3)  # the thread is now further than what was handed out
    state = ahead.state_dict()
    assert same(got + [next(ahead) for _ in range(7)], want)
    for prefetch in (0, 3):
        resumed = make_loader(prefetch, workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict()["energon"] == state["energon"]
        assert same([next(resumed) for _ in range(4)], want[5:9])


def test_state_looks_back_over_everything_made_ahead(make_loader, monkeypatch):
    """Energon's workers keep few checkpoints; here one with every batch, so that the oldest is really needed."""
    from functools import partial

    import keye_data.loader as module

    often = partial(module.get_savable_loader, checkpoint_every_sec=0, checkpoint_every_min_n_samples=1)
    monkeypatch.setattr(module, "get_savable_loader", often)
    loader = make_loader(8, workers=1)
    for _ in range(4):
        next(loader)
    assert wait_until(lambda: len(loader._ahead._shelf.items) == 8)
    time.sleep(0.5)  # the worker fills its own queue behind them
    state = loader.state_dict()
    want = [next(loader) for _ in range(4)]
    resumed = make_loader(0, workers=1)
    resumed.load_state_dict(state)
    assert same([next(resumed) for _ in range(4)], want)


def test_decoding_runs_beside_the_step(make_loader, monkeypatch):
    """Decoding is slowed to 50 ms a batch and the step takes 200 ms: the wait falls far below the time of decoding."""
    waits = {}
    for prefetch in (0, 2):
        loader = make_loader(prefetch)
        decode = loader._decode
        monkeypatch.setattr(loader, "_decode", lambda *batch, decode=decode: (time.sleep(0.05), decode(*batch))[1])
        next(loader)
        waits[prefetch] = 0.0
        for _ in range(5):
            time.sleep(0.2)
            begin = time.perf_counter()
            next(loader)
            waits[prefetch] += time.perf_counter() - begin
        loader.close()
    assert waits[0] >= 5 * 0.05
    assert waits[2] < waits[0] / 2


def test_a_wrong_backend_is_told_at_its_batch_and_close_leaves_no_thread(make_loader):
    loader = make_loader(2, workers=1, backend="dali", device="cpu")
    with pytest.raises(DataError, match="dali on cpu cannot decode h264"):
        next(loader)
    good = make_loader(2, workers=1)
    next(good), next(good)
    workers = good._loader._iterator._workers
    assert threads() and all(worker.is_alive() for worker in workers)
    good.close()
    assert not threads() and wait_until(lambda: not any(worker.is_alive() for worker in workers))


def test_a_worker_that_is_slow_to_begin_is_written_down_as_not_begun(make_loader, monkeypatch):
    """Asked for its place before it stands there, Energon's worker would name one batch further on."""
    from megatron.energon.savable_loader import SavableDatasetWrapper

    plain = make_loader(0, workers=2)
    want = [next(plain) for _ in range(6)]
    loader, iterate = make_loader(0, workers=2), SavableDatasetWrapper.__iter__

    def late(self):
        if self.worker_config.rank_worker_id() == 1 and self._cmd_thread is None:
            self._worker_id, self._running, self._command_lock = 1, True, threading.RLock()
            self._cmd_thread = threading.Thread(target=self._command_thread, args=(self,), daemon=True)
            self._cmd_thread.start()
            time.sleep(3)  # commands are answered, and nothing has begun
        yield from iterate(self)

    monkeypatch.setattr(SavableDatasetWrapper, "__iter__", late)
    next(loader)
    state = loader.state_dict()
    monkeypatch.undo()
    resumed = make_loader(0, workers=2)
    resumed.load_state_dict(state)
    assert same([next(resumed) for _ in range(5)], want[1:])
