"""When a loader's worker process ends: not before its trainer, and not long after it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import cache

from torch.utils.data import get_worker_info

SIGTERM_GRACE = 30  # seconds, as long as torchrun gives a rank
PARENT_CHECK = 2.0  # seconds


def live_as_long_as_the_trainer() -> None:
    """Call it as often as you like. In a worker process; nothing elsewhere.

    A SIGTERM to all processes of a job is for the trainer, which saves and then ends its workers; the grace bounds the life
    of a worker whose trainer hangs. A worker whose trainer was killed would wait for ever in a full pipe, whose other end
    its siblings hold open, so it looks for itself.
    """
    _bind(os.getpid())


@cache  # by process: a fork inherits what was cached before it
def _bind(pid: int) -> None:
    trainer = multiprocessing.parent_process()
    if get_worker_info() is None or trainer is None:
        return
    threading.Thread(target=_end_after, args=(trainer.pid,), name="end_with_trainer", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end_after(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(PARENT_CHECK)
    os._exit(1)
