"""Runs a loader over some samples and notes what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from keye_data.accounting import Account
from keye_data.loader import Loader
from keye_data.sample import Batch

MIB = 2**20


@dataclass
class Ids:
    """The tokens by which pictures and frames are told apart."""

    start: int
    image: int
    video: int


@dataclass
class Measured:
    """Of one rank's loader; times in seconds, memory in bytes."""

    first_batch: float = 0.0  # from asking for it to having it: start of the workers, full buffers
    elapsed: float = 0.0  # for all batches behind the first, to which every rate refers
    batches: int = 0
    first_samples: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of every sample
    rows: int = 0
    row_tokens: int = 0  # seq_length
    pictures: int = 0
    frames: int = 0
    patches: int = 0
    first: dict[str, int] = field(default_factory=dict)  # tokens, pictures and frames of the first batch
    waits: list[float] = field(default_factory=list)  # per batch, what a trainer without work of its own waits for it
    decoding: list[float] = field(default_factory=list)  # per batch, time spent on decoding pictures and clips
    account: Account = field(default_factory=Account)
    bad: list[Any] = field(default_factory=list)  # of keye_data.accounting.Skipped
    main_rss: list[int] = field(default_factory=list)  # after every batch
    worker_rss: list[int] = field(default_factory=list)  # of the largest worker, after every batch

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def measure(loader: Loader, samples: int, ids: Ids, progress: Callable[[int], None] = lambda n: None) -> Measured:
    """Takes batches until `samples` samples were delivered, or the loader ends. `progress` is told of every batch's samples."""
    found, process = Measured(), psutil.Process()
    batches = iter(loader)
    begun = time.perf_counter()
    while found.samples < samples:
        asked = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            break
        found.waits.append(time.perf_counter() - asked)
        _note(found, batch, ids)
        if found.batches == 1:
            found.first_batch = found.waits[0]
            begun = time.perf_counter()
            found.first = {"samples": found.samples, "tokens": found.tokens, "frames": found.frames}
        _memory(found, process, loader.worker_pids)
        progress(len(batch.keys))
    found.elapsed = time.perf_counter() - begun
    return found


def _note(found: Measured, batch: Batch, ids: Ids) -> None:
    tokens, begin, end = batch.input_ids.numpy(), batch.key_start.numpy(), batch.key_stop.numpy()
    seen = end > begin
    for row in range(len(tokens)):
        found.lengths += np.unique(begin[row][seen[row]], return_counts=True)[1].tolist()
    behind_start = tokens[:, 1:][(tokens[:, :-1] == ids.start) & seen[:, 1:]]
    found.pictures += int((behind_start == ids.image).sum())
    found.frames += int((behind_start == ids.video).sum())
    found.patches += len(batch.patches)
    found.rows += len(tokens)
    found.row_tokens = tokens.shape[1]
    found.batches += 1
    found.decoding.append(batch.decode_ms / 1000)
    found.account += Account.of([batch])
    found.bad += batch.bad


def _memory(found: Measured, process: psutil.Process, worker_pids: Iterable[int]) -> None:
    workers = [0]
    for pid in worker_pids:
        try:
            workers.append(psutil.Process(pid).memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    found.main_rss.append(process.memory_info().rss)
    found.worker_rss.append(max(workers))


def summary(found: Measured, sizes: dict[str, int]) -> dict[str, Any]:
    """Plain values for JSON. `sizes`: source -> samples in it. Rates leave the first batch out; None where nothing followed it."""
    pace = found.elapsed if found.batches > 1 else None

    def rate(count: int) -> float | None:
        return count / pace if pace else None

    lengths = np.array(found.lengths or [0])
    waits = np.array(found.waits[1:] or [0.0])
    drawn = {name: found.account.consumed.get(name, 0) for name in sizes}
    return {
        "samples": found.samples,
        "batches": found.batches,
        "seconds_to_first_batch": found.first_batch,
        "seconds": found.elapsed,
        "samples_per_second": rate(found.samples - found.first.get("samples", 0)),
        "tokens_per_second": rate(found.tokens - found.first.get("tokens", 0)),
        "frames_per_second": rate(found.frames - found.first.get("frames", 0)),
        "frames": found.frames,
        "pictures": found.pictures,
        "patches": found.patches,
        "tokens": found.tokens,
        "rows": found.rows,
        "row_tokens": found.row_tokens,
        "fill": found.tokens / (found.rows * found.row_tokens) if found.rows else None,
        "sample_tokens": {
            "mean": float(lengths.mean()),
            **{f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95)},
            "max": int(lengths.max()),
        },
        "wait_ms": {"mean": float(waits.mean() * 1000), "p95": float(np.percentile(waits, 95) * 1000)},
        "decode_ms_per_batch": float(np.mean(found.decoding or [0.0]) * 1000),
        "memory_mib": {
            "main_peak": max(found.main_rss, default=0) / MIB,
            "worker_peak": max(found.worker_rss, default=0) / MIB,
            "worker_growth": (found.worker_rss[-1] - found.worker_rss[len(found.worker_rss) // 2]) / MIB
            if found.worker_rss
            else 0.0,
        },
        "skipped": found.account.reasons,
        "sources": {
            name: {
                "samples": drawn[name],
                "share": drawn[name] / max(1, sum(drawn.values())),
                "skipped": found.account.skipped.get(name, 0),
                "epochs": epochs,
                "in_source": sizes[name],
            }
            for name, epochs in found.account.epochs(sizes).items()
        },
    }
