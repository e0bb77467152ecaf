"""Run a function on several ranks: forked, so that the seconds of importing torch and Megatron are paid once.

results = launch(train_two_steps, 2, recipe)     # [what rank 0 returned, what rank 1 returned]
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_keye.parallel import plan


def launch(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`fn(*args)` on `world_size` ranks of a gloo world -> what each returned, by rank.

    A rank finds the world initialised, its torchrun variables set, and no groups yet (`plan.initialize` makes them).
    Groups of this process are shut down first: their threads would not outlive a fork. Raises RuntimeError with the
    traceback of each rank that failed, or with where each rank stood after `timeout` seconds.
    """
    plan.shut_down()
    gc.collect()  # no group may be left for a child to destroy: it would wait for threads that a fork does not copy
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_child, args=(rank, world_size, folder, timeout, fn, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        _raise_failures(folder, [process.exitcode or 0 for process in ranks], timeout)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _child(rank: int, world_size: int, folder: Path, timeout: float, fn: Callable[..., Any], args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    gc.freeze()  # what the parent still holds (a model with its groups) is not this process's to destroy
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(timeout, file=stack)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / "store"), world_size),  # no port that another test might take
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout + 60),
            )
            result = fn(*args)
            (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
            plan.shut_down()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # leaving in order would wait for the other ranks
        finally:
            faulthandler.cancel_dump_traceback_later()


def _wait(ranks: list, timeout: float) -> None:
    """Until all have left, or one has failed and the rest had two seconds to say why, or the time is up."""
    deadline = time.monotonic() + timeout + 2  # the stacks are written at `timeout`
    failed = False
    while any(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + 2)
        next((process for process in ranks if process.exitcode is None), ranks[0]).join(0.05)


def _raise_failures(folder: Path, codes: list[int], timeout: float) -> None:
    errors, killed = [], []
    for rank, code in enumerate(codes):
        error, stack = folder / f"{rank}.error", folder / f"{rank}.stack"
        if error.exists():
            errors.append(f"rank {rank} failed:\n{error.read_text()}")
        elif code:
            killed.append(f"rank {rank} left with code {code}; after {timeout} s it stood at:\n{stack.read_text()}")
    if errors or killed:
        raise RuntimeError("\n".join(errors or killed))
