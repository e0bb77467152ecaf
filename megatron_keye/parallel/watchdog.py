"""A rank that dies or a collective that hangs ends the whole job, with one message that says who, when and in what.

    with Watchdog(timeout_minutes) as watchdog: ...build and train...

On every rank a thread tells the job's store, beat by beat, what the rank is doing. When a collective has waited for the
timeout, or has failed because a peer is gone, one rank speaks for all: it reads what the others said last, looks for
those who fell silent, prints the verdict and leaves it in the store; with that every rank ends, and ends those of its
machine that cannot end themselves, stopped processes. torchrun starts the job again where it is allowed to (--max-restarts).

On a GPU torch's own timeout of NCCL stands behind this one. That side is unverified: no machine of ours has run it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any

import psutil
import torch.distributed as dist

from keye_data.errors import DataError
from megatron_keye.errors import ElsewhereError, UserError
from megatron_keye.parallel.activity import activity, innermost

SILENT_BEATS = 4  # who has not been heard of for so many is gone
LEFT_IN_ORDER = (UserError, DataError, ElsewhereError, KeyboardInterrupt, SystemExit)
HINT = "the same command goes on from the newest checkpoint"


class Watchdog:
    """Does nothing where there is one rank. `timeout_minutes`: within it a hang has ended the job."""

    def __init__(self, timeout_minutes: float):
        timeout = 60 * timeout_minutes
        self.beat = min(2.0, timeout / 40)  # seconds
        self.patience = timeout - (SILENT_BEATS + 10) * self.beat  # leaves time for the verdict, and for all to end
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.state: dict[str, Any] = {"status": "runs"}
        self.over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.ranks > 1:
            activity.watch()
            # A connection of its own for a thread of its own: a wait in one must not keep the other from telling.
            store = dist.distributed_c10d._get_default_store().clone()
            self.store = dist.PrefixStore(f"watchdog{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", store)
            self._tell()
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.ranks == 1:
            return
        failed = isinstance(error, Exception) and not isinstance(error, LEFT_IN_ORDER)
        at = innermost(reversed(list(traceback.walk_tb(trace)))) if failed else "the end"
        if failed and _peer_is_gone(error):
            self.state = {"status": "lost a peer", "at": at}
            self._judge(f"{activity.latest or 'a collective'} failed ({_short(error)})")
        self.over.set()
        self.thread.join()
        self.state = {"status": f"failed ({kind.__name__}: {_short(error)})" if failed else "left", "at": at}
        with contextlib.suppress(RuntimeError):  # the store may have left before
            self._tell()
        if failed:
            traceback.print_exception(error)
            self._end()

    # ---- the thread

    def _watch(self) -> None:
        unheard = 0
        while not self.over.wait(self.beat):
            try:
                self._tell()
                if self.store.check(["verdict"]):
                    self._end()
                unheard = 0
            except RuntimeError as error:
                unheard += 1
                if unheard == SILENT_BEATS:
                    self._say(f"rank {self.rank} has lost the job's store in step {activity.step} ({_short(error)})")
                    self._end()
                continue
            waits = activity.waits_for()
            if waits is not None and time.monotonic() - waits.since > self.patience:
                self._judge(f"{waits} has hung for {time.monotonic() - waits.since:.0f} s")

    def _tell(self) -> None:
        waits = activity.waits_for()
        said = {
            "beat": time.monotonic(),  # that it changes is all that others read from it
            "step": activity.step,
            "waits": None if waits is None else str(waits),
            "for": 0.0 if waits is None else time.monotonic() - waits.since,
            "at": activity.place(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self.state,
        }
        self.store.set(f"rank{self.rank}", json.dumps(said))

    # ---- the verdict

    def _judge(self, what: str) -> None:
        """Say who is to blame for `what`, once for the whole job, and end this rank. Does not return."""
        try:
            if self.store.add("speakers", 1) == 1:
                before = self._everyone()
                time.sleep(SILENT_BEATS * self.beat)
                self._say(verdict(self.rank, activity.step, what, before, self._everyone()))
                self.store.set("verdict", "given")
            for _ in range(4 * SILENT_BEATS):  # not store.wait, which would keep the thread from telling
                if self.store.check(["verdict"]):
                    break
                time.sleep(self.beat)
        except RuntimeError:
            self._say(f"rank {self.rank}, step {activity.step}: {what}, and the job's store is lost")
        self._end()

    def _everyone(self) -> list[dict[str, Any]]:
        keys = [f"rank{rank}" for rank in range(self.ranks)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def _say(self, text: str) -> None:
        print(f"error: {text}; {HINT}", file=sys.stderr, flush=True)

    def _end(self) -> None:
        """Not in order, which would wait for other ranks, or for the loader's processes, whose pipes nobody reads."""
        with contextlib.suppress(RuntimeError):
            for other in self._everyone():
                if other.get("host") == socket.gethostname():
                    _kill_if_stopped(other["pid"])
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(1)


def _kill_if_stopped(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_STOPPED:
            process.kill()


def verdict(speaker: int, step: int, what: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """One sentence naming the rank at fault, the step and the collective, from what all ranks said at two moments."""
    others = [rank for rank in range(len(after)) if rank != speaker]
    status = {rank: after[rank].get("status", "runs") for rank in others}
    failed = [rank for rank in others if status[rank].startswith("failed")]
    left = [rank for rank in others if status[rank] == "left"]
    silent = [r for r in others if r not in (*failed, *left) and after[r].get("beat") == before[r].get("beat")]
    elsewhere = [rank for rank in others if status[rank] == "runs" and not after[rank].get("waits")]
    causes = (
        (failed, "{status}"),
        (left, "has left the run"),
        (silent, "is dead or stopped"),
        (elsewhere, "is not in it"),
    )
    for blamed, does in causes:
        if blamed:
            return f"step {step}: {what}: {_and_more(blamed)} {does.format(**after[blamed[0]])} ({_stood(after[blamed[0]])})"
    waits = "; ".join(f"rank {rank} waits for {after[rank]['waits']} ({_stood(after[rank])})" for rank in others[:4])
    return f"step {step}: {what} on rank {speaker}, while {waits}"


def _and_more(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else "")


def _stood(said: dict[str, Any]) -> str:
    if not said:
        return "never heard of"
    return f"last heard of in step {said['step']} at {said['at']}" + (f", in {said['waits']}" if said["waits"] else "")


def _peer_is_gone(error: BaseException) -> bool:
    """torch has no one type for it: NCCL and the store raise DistError, gloo a RuntimeError that names its own sources."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _short(error: BaseException) -> str:
    """Its first sentence, without the place in torch's sources that gloo puts before it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". ")[0][:200]
