"""A Hugging Face folder against a checkpoint: its config.json, and tensor by tensor, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_keye.conversion.parts import Say
from megatron_keye.conversion.progress import Progress, quiet
from megatron_keye.conversion.stored import Stored
from megatron_keye.model.hf_config import differences
from megatron_keye.model.hf_files import Checkpoint
from megatron_keye.model.hf_stream import Lazy

CHUNK = 1 << 26  # values compared at once


def verify(
    hf: Path, ckpt: Path, dtype: torch.dtype | None = None, progress: Progress = quiet, say: Say = print
) -> bool:
    """Compares configurations, names, shapes, dtypes and bits, and says every difference; True when there is none.

    Raises UserError for files that cannot be read: a shard cut short, an index that names what no shard holds.
    """
    files, stored = Checkpoint(hf), Stored(ckpt, dtype, progress)
    unlike = differences(hf, stored.cfg)
    for key, theirs, ours in unlike:
        say(f"config: {key} is {theirs} in {hf / 'config.json'} and {ours} in the checkpoint")
    tensors = dict(stored.tensors())
    differing = 0
    with progress("comparing", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for name, tensor in tensors.items():
            if fault := _difference(name, tensor, files):
                differing += 1
                say(fault)
            advance(tensor.nbytes)
    extra = [name for name in files.names() if name not in tensors]
    for name in extra:
        say(f"extra: {name} is in {hf} and not in the checkpoint")
    differing += len(extra)
    if differing:
        say(f"{differing} of {len(tensors) + len(extra)} tensors differ between {hf} and {stored.folder}")
    else:
        say(f"{len(tensors)} tensors of {hf} equal those of {stored.folder}, bit for bit")
    return not differing and not unlike


def _difference(name: str, ours: Lazy, files: Checkpoint) -> str | None:
    if name not in files:
        return f"missing: {name} is in the checkpoint and not in {files.folder}"
    shape = tuple(files.shape(name))
    if shape != ours.shape:
        turned = "; it is transposed" if shape == ours.shape[::-1] else ""
        return f"shape: {name} is {list(shape)} in {files.folder} and {list(ours.shape)} in the checkpoint{turned}"
    if files.dtype(name) is not ours.dtype:
        return f"dtype: {name} is {files.dtype(name)} in {files.folder} and {ours.dtype} in the checkpoint"
    mine, theirs = _bits(ours.get()), _bits(files.get(name))
    if torch.equal(mine, theirs):
        return None
    wrong = sum(int((a != b).sum()) for a, b in zip(mine.flatten().split(CHUNK), theirs.flatten().split(CHUNK)))
    turned = "; it is transposed" if _is_square(mine) and torch.equal(mine.T, theirs) else ""
    return f"differs: {name} in {wrong} of {mine.numel()} values{turned}"


def _is_square(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
