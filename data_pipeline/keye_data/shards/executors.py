"""Where shards are built: here, in processes of this machine, or on the machines of a Ray cluster. The work is the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Protocol

from keye_data.cluster import connect
from keye_data.errors import DataError
from keye_data.shards.shard import Done, Task, build_shard

POLL = 0.5  # seconds


class Pool(Protocol):
    """Somewhere to run tasks."""

    slots: int  # tasks under way or waiting there

    def submit(self, task: Task) -> Any: ...

    def wait(self, handles: set[Any]) -> set[Any]:
        """Those that are done, after at most POLL seconds."""
        ...

    def result(self, handle: Any) -> Done: ...

    def close(self) -> None:
        """Ends what is still under way."""
        ...


def run(tasks: Iterable[Task], pool: Pool | None, tick: Callable[[list[Task]], None]) -> Iterator[Done]:
    """Builds the shards, in any order. `tick` is called now and then with the tasks under way. The first error ends it."""
    if pool is None:
        for task in tasks:
            done = build_shard(task)
            tick([task])
            yield done
        return
    waiting: dict[Any, Task] = {}
    source = iter(tasks)
    try:
        while True:
            for task in islice(source, pool.slots - len(waiting)):
                waiting[pool.submit(task)] = task
            if not waiting:
                return
            for handle in pool.wait(set(waiting)):
                done = pool.result(handle)
                tick([waiting.pop(handle)])
                yield done
            tick(list(waiting.values()))
    finally:
        pool.close()


class Processes:
    """`workers` processes of this machine."""

    def __init__(self, workers: int) -> None:
        self.slots = 2 * workers
        # Spawned, not forked: a copy of threads and open decoders would not be safe.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker)

    def submit(self, task: Task) -> Any:
        return self.pool.submit(build_shard, task)

    def wait(self, handles: set[Any]) -> set[Any]:
        return wait(handles, timeout=POLL, return_when=FIRST_COMPLETED).done

    def result(self, handle: Any) -> Done:
        try:
            return handle.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, most likely for want of memory; "
                "run the same command again with fewer --workers to go on"
            ) from error

    def close(self) -> None:
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _worker() -> None:
    """In each process: one thread for numerics, and no life beyond the parent's, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Ray:
    """The machines of a Ray cluster, which must see source and output under the same paths.

    `address` "" is that in RAY_ADDRESS, else "local", a new one of `workers` processes here. DataError where Ray is missing
    or the cluster cannot be reached.
    """

    def __init__(self, address: str, workers: int) -> None:
        self.started = connect(address or os.environ.get("RAY_ADDRESS") or "local", workers, "--ray")
        import ray

        self.ray = ray
        self.slots = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        # A task may be repeated: on a machine that was lost it has left nothing that counts.
        self.work = ray.remote(num_cpus=1, max_retries=3)(build_shard)

    def submit(self, task: Task) -> Any:
        return self.work.remote(task)

    def wait(self, handles: set[Any]) -> set[Any]:
        return set(self.ray.wait(list(handles), num_returns=1, timeout=POLL)[0])

    def result(self, handle: Any) -> Done:
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (DataError, OSError)) else error) from None
        except self.ray.exceptions.RayError as error:
            raise DataError(f"--ray: a machine was lost: {error}; run the same command again to go on") from error

    def close(self) -> None:
        if self.started:
            self.ray.shutdown()
