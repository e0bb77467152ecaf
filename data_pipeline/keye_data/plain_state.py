"""Energon's loader state <-> plain values, so that a checkpoint holds no pickled classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

CLASSES = {
    cls.__name__: cls
    for cls in (SliceState, SystemRngState, SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState)
}


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, bytes and None; everything else becomes a list that starts with its kind."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        return [kind, array.dtype.str, list(array.shape), array.tobytes()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(to_plain, value)]
    if isinstance(value, FlexState):
        return ["FlexState", {key: to_plain(item) for key, item in value.items()}]
    if isinstance(value, dict):
        return ["dict", *([to_plain(key), to_plain(item)] for key, item in value.items())]
    if type(value).__name__ in CLASSES:
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__name__, fields]
    raise TypeError(f"the loader's state holds a {type(value).__name__}, which is not known here: another Energon?")


def from_plain(value: Any) -> Any:
    """The inverse of to_plain. Raises TypeError for a kind that is not known."""
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind in ("tensor", "array"):
        dtype, shape, data = rest
        array = np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape).copy()
        return torch.from_numpy(array) if kind == "tensor" else array
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(from_plain, rest))
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in rest}
    if kind == "FlexState":
        return FlexState({key: from_plain(item) for key, item in rest[0].items()})
    if kind in CLASSES:
        return CLASSES[kind](**{name: from_plain(item) for name, item in rest[0].items()})
    raise TypeError(f"the loader's state holds the unknown kind {kind!r}")
