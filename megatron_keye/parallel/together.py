"""One rank's mistake ends all ranks: none is left waiting in a collective until its timeout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from keye_data.errors import DataError
from megatron_keye.errors import ElsewhereError, UserError

T = TypeVar("T")


def together(part: Callable[[], T]) -> T:
    """What `part` returns, once it has succeeded on every rank; every rank must call.

    A UserError or DataError is raised again where it arose, and as ElsewhereError, which says nothing, on the others.
    """
    problem: Exception | None = None
    result: T | None = None
    try:
        result = part()
    except (UserError, DataError) as error:
        problem = error
    failed = [False] * dist.get_world_size()
    dist.all_gather_object(failed, problem is not None)
    if problem is not None:
        raise problem
    if any(failed):
        raise ElsewhereError(f"rank {failed.index(True)} reports the error")
    return result  # type: ignore[return-value]
