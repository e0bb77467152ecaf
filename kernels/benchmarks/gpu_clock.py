"""Time on a device, whole calls and kernel by kernel, and the memory that a call adds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from keye_kernels.dsa.triton_backend.launch import launch
from keye_kernels.dsa.triton_backend.recorder import standing_in


def synchronise(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, budget: float, most: int = 20) -> float:
    """Median over as many calls as fit into `budget` seconds, 3 to `most`, after one that compiles and warms up.

    budget 0 calls once and means nothing: for rehearsals.
    """
    if budget == 0:
        return _once(call, device)
    call()
    first = _once(call, device)
    repeats = max(2, min(most - 1, int(budget * 1e3 / max(first, 1e-3))))
    return statistics.median([first, *(_once(call, device) for _ in range(repeats))])


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronise(device)
    begin_event.record()
    call()
    end_event.record()
    synchronise(device)
    return begin_event.elapsed_time(end_event)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Greatest number of bytes allocated during the call above what was there before; None where there is no counter."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernel_milliseconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """One call with a clock around each kernel -> {"module.kernel": milliseconds, summed over its launches}."""
    marks: list[tuple[str, Callable[[], float]]] = []

    def timed(kernel, grid, *args, **options) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
        if device.type != "cuda":
            begin = time.perf_counter()
            launch(kernel, grid, *args, **options)
            spent = (time.perf_counter() - begin) * 1e3
            marks.append((name, lambda: spent))
            return
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        launch(kernel, grid, *args, **options)
        events[1].record()
        marks.append((name, lambda: events[0].elapsed_time(events[1])))

    with standing_in(timed):
        call()
    synchronise(device)
    sums: dict[str, float] = defaultdict(float)
    for name, spent in marks:
        sums[name] += spent()
    return dict(sums)
