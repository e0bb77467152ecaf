"""When two runs of batches are the same."""

from __future__ import annotations

import torch

from keye_data.sample import Batch

TENSORS = ("input_ids", "targets", "position_ids", "key_start", "key_stop", "patches", "grid")


def same(a: list[Batch], b: list[Batch]) -> bool:
    """Order and bytes."""
    return len(a) == len(b) and all(
        x.keys == y.keys
        and x.sources == y.sources
        and x.skipped == y.skipped
        and all(torch.equal(getattr(x, name), getattr(y, name)) for name in TENSORS)
        for x, y in zip(a, b)
    )
