"""These tests run Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so one process either interprets or compiles. `make test` starts
the interpreted process by tests/kernels/dsa/test_interpreted.py; by hand: TRITON_INTERPRET=1 pytest tests/kernels/dsa/triton
"""

from __future__ import annotations

import os

import pytest
import torch

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
