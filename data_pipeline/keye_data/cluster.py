"""Joining a Ray cluster, or starting one of this machine alone."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from keye_data.errors import DataError

INSTALL = 'pip install "ray>=2.60"'
OBJECT_STORE = 512 << 20  # bytes, of a cluster started here


def require_ray(what: str) -> None:
    """DataError, where Ray is not installed, naming `what` needs it."""
    if importlib.util.find_spec("ray") is None:
        raise DataError(f"{what} needs Ray, which is not installed: {INSTALL}")


def connect(address: str, cpus: int, what: str) -> bool:
    """Joins the cluster at `address` (host:port, or "auto" for the one Ray finds); "local" starts one of `cpus` here.

    False if this process has joined one before, which then serves. Signals keep the handlers they had. DataError naming
    `what`, where there is no Ray or no cluster.
    """
    require_ray(what)
    import ray

    if ray.is_initialized():
        return False
    if address != "local":
        _knock(address, what)
    package = str(Path(__file__).resolve().parents[1])
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    options: dict[str, Any] = {"address": address, **(local if address == "local" else {})}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{what}: the Ray cluster {address} cannot be reached: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's would end a trainer that wants to save first
    return True


def _knock(address: str, what: str) -> None:
    """DataError if nothing answers at host:port, which Ray itself would find out after minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise DataError(f"{what}: the Ray cluster {address} cannot be reached: {error}") from error
