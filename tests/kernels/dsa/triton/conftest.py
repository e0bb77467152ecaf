"""These tests run Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so one process either interprets or compiles. `make test` starts
the interpreted process by tests/kernels/dsa/test_interpreted.py; by hand: TRITON_INTERPRET=1 pytest tests/kernels/dsa/triton
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from keye_kernels.dsa.triton_backend import blocks, fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; the test is skipped where they cannot."""
    if INTERPRETED:
        from keye_kernels.dsa.triton_backend import interpreter

        interpreter.install()
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("no CUDA device; without one test_interpreted.py runs this in a process of its own")


@pytest.fixture(scope="session")
def interpreted(device) -> bool:
    """Whether the kernels run in the interpreter: about 50 microseconds an operation, so sizes stay small there."""
    return INTERPRETED


@pytest.fixture(autouse=True)
def _poisoned_buffers():
    """Every torch.empty holds NaN, or the greatest integer: whatever a kernel reads or leaves without writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def chunks_of_pairs(monkeypatch) -> Callable[[int], None]:
    """Sets how many query-key pairs a chunk may have, so that little work runs in several ragged pieces."""

    def cut(pairs: int) -> None:
        monkeypatch.setattr(blocks, "PAIRS_PER_CHUNK", pairs)
        monkeypatch.setattr(fused, "PAIRS_PER_CHUNK", pairs)

    return cut
