"""Checkpoint -> Hugging Face folder, a parameter at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.settings import DataConfig
from keye_data.tokenizer import load_tokenizer
from megatron_keye.config.load import load_recipe
from megatron_keye.conversion.parts import Say
from megatron_keye.conversion.progress import Progress, quiet
from megatron_keye.conversion.stored import Stored
from megatron_keye.journal import Journal
from megatron_keye.model.hf import default_experts, write_beside
from megatron_keye.model.hf_files import SHARD_BYTES, publishing, write_tensors


def export(
    ckpt: Path,
    out: Path,
    experts: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    progress: Progress = quiet,
    say: Say = print,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Checkpoint -> Hugging Face folder -> how many tensors of the per-expert layout went into it.

    experts None: fused for Keye, separate for plain Qwen3-MoE, as each is released; dtype: see Stored. Shards that a
    killed export of the same into `out` has finished stay. Raises UserError for a folder that holds something else.
    """
    stored = Stored(ckpt, dtype, progress)
    if stored.frozen:
        say(f"{stored.frozen} parameters were frozen and have no fp32 master copy: their stored values are exact")
    processor = _processor(stored.folder, tokenizer, stored.cfg.max_position_embeddings, say)
    experts = experts or default_experts(stored.cfg)
    tensors = list(stored.tensors())
    with publishing(out, resume=True) as draft:
        source = {"sums": stored.sums, "experts": experts, "dtype": str(dtype), "shard_bytes": shard_bytes}
        journal = Journal(draft, source)
        if journal.news:
            say(journal.news)
        with progress("writing", sum(tensor.nbytes for _, tensor in tensors)) as advance:
            write_tensors(draft, tensors, experts, shard_bytes, journal, advance)
        write_beside(draft, stored.cfg, tensors[0][1].dtype, processor)
    return len(tensors)


def _processor(folder: Path, tokenizer: str | None, longest: int, say: Say) -> Processor | None:
    """From --tokenizer, else from what the run itself used; without a run, room for the longest input of the model."""
    settings = DataConfig(seq_length=longest)
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
