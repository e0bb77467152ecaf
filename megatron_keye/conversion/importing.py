"""Hugging Face folder -> checkpoint, a parameter at a time."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_keye.config.model import ModelConfig
from megatron_keye.conversion.entries import Entry, entries
from megatron_keye.conversion.parts import Joined, Say, Start, start_config
from megatron_keye.conversion.progress import Progress, quiet
from megatron_keye.conversion.streamed import FILE_BYTES, Streamed
from megatron_keye.errors import UserError
from megatron_keye.journal import Journal
from megatron_keye.model.hf import check_tensors
from megatron_keye.model.hf_config import read_config
from megatron_keye.model.hf_files import Checkpoint, Source, publishing
from megatron_keye.training import checkpoint


def import_hf(
    hf: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    start: Start | None = None,
    progress: Progress = quiet,
    say: Say = print,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Hugging Face folder -> `out`/iter_0000000, weights alone, for training.init_from. dtype None: each as stored.

    `start`: `hf` is plain Qwen3-MoE and becomes a Keye. What a killed import of the same into `out` has finished stays.
    Raises UserError when `out` has checkpoints already, and for tensors missing, left over, misshapen or of odd dtypes.
    """
    if checkpoint.newest(out) is not None:
        raise UserError(f"{out} holds checkpoints already; name a new folder")
    cfg = read_config(hf) if start is None else start_config(hf, start, say)
    files = Checkpoint(hf)
    model, state, wanted = entries(cfg)
    source: Source = files if start is None else Joined(files, start, wanted, cfg, dtype, say)
    check_tensors(source, cfg, model.parts)
    dtypes = _dtypes(wanted, source, dtype)

    def pieces(entry: Entry) -> Sequence[torch.Tensor]:
        tensors = [source.get(name) for name in entry.link.released]
        return entry.pieces([tensor if dtype is None else tensor.to(dtype) for tensor in tensors])

    folder = checkpoint.iteration_folder(out, 0)
    with publishing(folder, resume=True) as draft:
        journal = Journal(draft, _described(hf, cfg, dtype, start, file_bytes))
        if journal.news:
            say(journal.news)
        total = sum(entry.parameter.numel() * dtypes[entry.parts[0].key].itemsize for entry in wanted)
        with progress("writing", total) as advance:
            # Megatron warns of a folder that is not empty, as one that is gone on with never is.
            logging.getLogger(dist_checkpointing.serialization.__name__).setLevel(logging.ERROR)
            writer = Streamed(wanted, dtypes, pieces, journal, advance, file_bytes)
            dist_checkpointing.save(state, str(draft), writer, content_metadata=None)
        _write_beside(draft, cfg, journal)
    checkpoint.point_to(out, 0)
    return folder


def _write_beside(draft: Path, cfg: ModelConfig, journal: Journal) -> None:
    state = {**dataclasses.asdict(checkpoint.Progress()), "layout": None}  # no layout: no run wrote it
    (draft / "state.json").write_text(json.dumps(state, indent=1))
    (draft / "model.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    files = sorted(file for file in draft.iterdir() if not journal.owns(file.name))
    sums = {file.name: journal.sums(file.name) or checkpoint.checksum(file) for file in files}
    (draft / "checksums.json").write_text(json.dumps(sums, indent=1))


def _dtypes(wanted: Sequence[Entry], source: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Of each stored tensor. It holds a parameter of every layer, and q, k and v, so that these must be of one kind."""
    dtypes: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for entry in wanted:
        key = entry.parts[0].key
        for name in entry.link.released:
            here = source.dtype(name)
            if dtype is None and dtypes.setdefault(key, here) is not here:
                raise UserError(
                    f"{source.folder}: {first[key]} is {dtypes[key]} but {name} is {here}, and the two are stored as "
                    "one tensor; choose with --dtype"
                )
            first.setdefault(key, name)
        if dtype is not None:
            dtypes[key] = dtype
    return dtypes


def _described(
    hf: Path, cfg: ModelConfig, dtype: torch.dtype | None, start: Start | None, file_bytes: int
) -> dict[str, Any]:
    """All that decides what is written."""
    folders = [hf] if start is None or start.vision_hf is None else [hf, start.vision_hf]
    files = sorted(file.resolve() for folder in folders for file in folder.glob("*.safetensors"))
    return {
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "model": dataclasses.asdict(cfg),
        "dtype": str(dtype),
        "start": None if start is None else {**dataclasses.asdict(start), "vision_hf": str(start.vision_hf)},
        "file_bytes": file_bytes,
    }
