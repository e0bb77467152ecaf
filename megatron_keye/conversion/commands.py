"""What tools/convert.py does: import, export, verify."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.settings import DataConfig
from keye_data.tokenizer import load_tokenizer
from megatron_keye.config.load import load_recipe
from megatron_keye.conversion.stored import Stored
from megatron_keye.errors import UserError
from megatron_keye.model.hf import fill, write_folder
from megatron_keye.model.hf_config import read_config
from megatron_keye.model.hf_files import Checkpoint
from megatron_keye.model.keye import KeyeModel
from megatron_keye.training import checkpoint
from megatron_keye.training.model_state import model_state

Progress = Callable[[Iterable, int], Iterable]  # (items, how many) -> the same items, counted on the way
Say = Callable[[str], None]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def quiet(items: Iterable, total: int) -> Iterable:
    return items


def import_hf(hf: Path, out: Path, dtype: torch.dtype | None = None, progress: Progress = quiet) -> Path:
    """Hugging Face folder -> `out`/iter_0000000, weights alone, for training.init_from. dtype None: as stored.

    Raises UserError when `out` has checkpoints already, and for all that from_hf refuses.
    """
    if checkpoint.newest(out) is not None:
        raise UserError(f"{out} holds checkpoints already; name a new folder")
    cfg, files = read_config(hf), Checkpoint(hf)
    model = KeyeModel(cfg, dtype or files.common_dtype())
    steps = iter(progress(files.names(), len(files.names())))

    def read(name: str) -> torch.Tensor:
        next(steps, None)
        return files.get(name)

    fill(files, cfg, model.parts, read)
    next(steps, None)
    folder = checkpoint.iteration_folder(out, 0)
    draft = out / f".{folder.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_weights(model, draft)
        os.replace(draft, folder)
        (out / checkpoint.LATEST).write_text("0")
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder} could not be written ({reason}); make room there and start again") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return folder


def _write_weights(model: KeyeModel, draft: Path) -> None:
    dist_checkpointing.save(model_state([model.language_model], model.visual), str(draft), content_metadata=None)
    state = {**dataclasses.asdict(checkpoint.Progress()), "layout": None}  # no layout: no run wrote it
    (draft / "state.json").write_text(json.dumps(state, indent=1))
    (draft / "model.json").write_text(json.dumps(dataclasses.asdict(model.cfg), indent=1))
    sums = {file.name: checkpoint.checksum(file) for file in sorted(draft.iterdir())}
    (draft / "checksums.json").write_text(json.dumps(sums, indent=1))


def export(
    ckpt: Path,
    out: Path,
    experts: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    progress: Progress = quiet,
    say: Say = print,
) -> int:
    """Checkpoint -> Hugging Face folder -> how many tensors of the per-expert layout went into it.

    experts None: fused for Keye, separate for plain Qwen3-MoE, as each is released; dtype: see Stored.
    """
    stored = Stored(ckpt, dtype)
    if stored.frozen:
        say(f"{stored.frozen} parameters were frozen and have no fp32 master copy: their stored values are exact")
    processor = _processor(stored.folder, tokenizer, say)
    tensors = iter(progress(stored.tensors(), len(stored)))
    first = next(tensors)
    write_folder(out, stored.cfg, itertools.chain([first], tensors), first[1].dtype, experts, processor)
    return len(stored)


def _processor(folder: Path, tokenizer: str | None, say: Say) -> Processor | None:
    """From --tokenizer, else from what the run itself used."""
    settings = DataConfig()
    recipe = folder / "resolved.yaml"
    if recipe.is_file():
        settings = load_recipe(recipe).data
    if tokenizer is not None:
        return Processor(load_tokenizer(tokenizer), dataclasses.replace(settings, tokenizer=tokenizer))
    if not recipe.is_file():
        say("no tokenizer and preprocessor files: the checkpoint does not name a tokenizer; --tokenizer PATH adds them")
        return None
    try:
        return Processor(load_tokenizer(settings.tokenizer), settings)
    except DataError as error:
        say(f"no tokenizer and preprocessor files: {error}; --tokenizer PATH adds them")
        return None


def verify(
    hf: Path, ckpt: Path, dtype: torch.dtype | None = None, progress: Progress = quiet, say: Say = print
) -> bool:
    """Compares names, shapes, dtypes and bits, and says every difference; True when there is none."""
    stored, files = Stored(ckpt, dtype), Checkpoint(hf)
    count = differing = 0
    seen = set()
    for name, ours in progress(stored.tensors(), len(stored)):
        seen.add(name)
        count += 1
        if fault := _difference(name, ours, files):
            differing += 1
            say(fault)
    extra = [name for name in files.names() if name not in seen]
    for name in extra:
        say(f"extra: {name} is in {hf} and not in the checkpoint")
    differing += len(extra)
    if differing:
        say(f"{differing} of {count + len(extra)} tensors differ between {hf} and {stored.folder}")
    else:
        say(f"{count} tensors of {hf} equal those of {stored.folder}, bit for bit")
    return differing == 0


def _difference(name: str, ours: torch.Tensor, files: Checkpoint) -> str | None:
    if name not in files:
        return f"missing: {name} is in the checkpoint and not in {files.folder}"
    theirs: Any = list(files.shape(name))
    if theirs != list(ours.shape):
        return f"shape: {name} is {theirs} in {files.folder} and {list(ours.shape)} in the checkpoint"
    if files.dtype(name) is not ours.dtype:
        return f"dtype: {name} is {files.dtype(name)} in {files.folder} and {ours.dtype} in the checkpoint"
    wrong = int((_bits(files.get(name)) != _bits(ours)).sum())
    return f"differs: {name} in {wrong} of {ours.numel()} values" if wrong else None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
