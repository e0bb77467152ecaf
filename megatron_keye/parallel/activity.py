"""What this rank is doing: the step it is in, the collectives it waits for, and where its main thread stands.

Every collective of torch.distributed, whoever calls it, goes through a method of ProcessGroup; those are watched here.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "receive",
    "recv_anysource": "receive",
}
OURS = ("/megatron_keye/", "/keye_data/", "/keye_kernels/")


@dataclass
class Collective:
    """One that was begun here. `work()` is torch's handle, and None once nobody holds it any more."""

    name: str
    ranks: list[int]
    since: float
    work: Callable[[], Any] | None = None  # None while it is being begun

    def done(self) -> bool:
        if self.work is None:
            return False
        work = self.work()
        return work is None or work.is_completed()

    def __str__(self) -> str:
        more = " ..." if len(self.ranks) > 16 else ""
        return f"{self.name} over ranks {', '.join(map(str, self.ranks[:16]))}{more}"


class Activity:
    def __init__(self) -> None:
        self.step = 0  # 0: before the first
        self.latest: Collective | None = None
        self._last: dict[
            str, Collective
        ] = {}  # of each group; a group's collectives end in the order of their beginning
        self._watching = False

    def watch(self) -> None:
        """From now on collectives are noted."""
        self._last.clear()
        if not self._watching:
            self._watching = True
            for method, name in COLLECTIVES.items():
                if hasattr(dist.ProcessGroup, method):
                    setattr(dist.ProcessGroup, method, self._noting(method, name))

    def _noting(self, method: str, name: str) -> Callable[..., Any]:
        begin = getattr(dist.ProcessGroup, method)

        @functools.wraps(begin)
        def noted(group: dist.ProcessGroup, *args, **kwargs):
            collective = Collective(name, dist.get_process_group_ranks(group), time.monotonic())
            self.latest = self._last[group.group_name] = collective
            work = begin(group, *args, **kwargs)
            # On a CPU the work is done when its handle is dropped, and holding that would only hold its tensors.
            collective.work = (lambda: work) if torch.cuda.is_available() or work is None else weakref.ref(work)
            return work

        return noted

    def waits_for(self) -> Collective | None:
        """The collective that has been waited for longest."""
        waiting = [collective for collective in list(self._last.values()) if not collective.done()]
        return min(waiting, key=lambda collective: collective.since, default=None)

    def place(self) -> str:
        """Where the main thread stands in code of ours: "training/feed.py:42 take"."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return innermost(traceback.walk_stack(frame)) if frame is not None else "nowhere"


def innermost(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Of frames from the inside out, the first in code of ours."""
    stack = list(frames)
    ours = [(f, line) for f, line in stack if any(part in f.f_code.co_filename for part in OURS)]
    for frame, line in [*ours, *stack][:1]:
        return f"{'/'.join(frame.f_code.co_filename.rsplit('/', 2)[-2:])}:{line} {frame.f_code.co_name}"
    return "nowhere"


activity = Activity()
