"""The one door through which every kernel starts, so that a test can stand in it and see what would run."""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Start `kernel` on the device of its first tensor; an empty grid starts nothing.

    args are the run-time arguments in the kernel's order; constants are its tl.constexpr arguments, by name.
    """
    if 0 in grid:
        return
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type != "cuda":
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    with torch.cuda.device(device):  # Triton launches on the current device, not on that of its arguments
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
