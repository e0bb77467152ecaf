"""Hugging Face folders in and out: every released tensor is used, every parameter is filled, no bit is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from keye_data.processor import Processor
from keye_data.settings import DataConfig
from keye_data.tokenizer import load_tokenizer
from megatron_keye.config.model import ModelConfig, check_same_model
from megatron_keye.errors import UserError
from megatron_keye.hf_release.shipping import ship_model, ship_processor
from megatron_keye.model.hf_config import read_config, write_config
from megatron_keye.model.hf_files import Checkpoint, Source, publishing, write_tensors
from megatron_keye.model.keye import KeyeModel
from megatron_keye.model.names import links, load_released, released_shapes, released_tensors

Named = tuple[str, torch.Tensor]


def from_hf(folder: str | Path, dtype: torch.dtype | None = None, **overrides: object) -> KeyeModel:
    """The model of a Hugging Face folder, in eval mode. `dtype` None keeps the stored one; overrides are model-section keys.

    attention_mode is "sparse" for a Keye folder, "dense" for plain Qwen3-MoE, which has no vision tower and no indexers.
    Raises UserError for an unknown architecture, and for tensors missing, left over or of another shape.
    """
    cfg = read_config(folder, **overrides)
    files = Checkpoint(folder)
    model = KeyeModel(cfg, dtype or files.common_dtype())
    fill(files, cfg, model.parts)
    return model.eval()


def load_hf(folder: str | Path, cfg: ModelConfig, language: Sequence[nn.Module], tower: nn.Module | None) -> None:
    """Fill the stages of this rank, in any layout; every rank calls it. The folder must hold the model of `cfg`."""
    check_same_model(folder, dataclasses.asdict(read_config(folder)), cfg)
    fill(Checkpoint(folder), cfg, [*language] if tower is None else [*language, tower])


def to_hf(
    model: KeyeModel,
    folder: str | Path,
    experts: str | None = None,
    tokenizer: str | Path | Processor | None = None,
) -> None:
    """Write the model as a Hugging Face folder, which appears whole or not at all.

    experts: "fused" (one tensor for a layer's experts, as Keye is released) or "separate" (as plain Qwen3-MoE is); None
    takes the model's own. tokenizer: a folder or file whose tokenizer goes along, with the processor. Keye's folder carries
    the code that transformers needs (hf_release).
    Raises UserError when `folder` is not empty or cannot be written.
    """
    processor = _processor(tokenizer, model.cfg)
    with publishing(folder) as draft:
        write_tensors(draft, exported(model), experts or default_experts(model.cfg))
        write_beside(draft, model.cfg, next(model.parameters()).dtype, processor)


def exported(model: KeyeModel) -> Iterator[Named]:
    """Every tensor of the model by its canonical released name."""
    for part in model.parts:
        yield from released_tensors(part, model.cfg)


def default_experts(cfg: ModelConfig) -> str:
    """As each model is released: Keye's experts fused, plain Qwen3-MoE's separate."""
    return "fused" if cfg.vision_layers else "separate"


def write_beside(folder: Path, cfg: ModelConfig, dtype: torch.dtype, processor: Processor | None) -> None:
    """All of a Hugging Face folder but its tensors: configurations, and the code that runs them."""
    write_config(cfg, folder, str(dtype).removeprefix("torch."))
    if cfg.vision_layers:  # plain Qwen3-MoE is transformers' own
        ship_model(folder)
    if processor is not None:
        _save(processor, folder)
        if cfg.vision_layers:
            ship_processor(folder)


def _save(processor: Processor, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what the tokenizers library raises for a full disk has no narrower type
        raise OSError(str(error)) from error


def _processor(tokenizer: str | Path | Processor | None, cfg: ModelConfig) -> Processor | None:
    if tokenizer is None or isinstance(tokenizer, Processor):
        return tokenizer
    settings = DataConfig(tokenizer=str(tokenizer), seq_length=cfg.max_position_embeddings)
    return Processor(load_tokenizer(tokenizer), settings)


def fill(files: Checkpoint, cfg: ModelConfig, modules: Sequence[nn.Module]) -> None:
    """Fill this rank's modules; every rank calls it."""
    check_tensors(files, cfg, modules)
    for module in modules:
        load_released(module, cfg, files.get)


def check_tensors(files: Source, cfg: ModelConfig, modules: Sequence[nn.Module]) -> None:
    """Every released tensor is there in its shape, and none is left over. The ranks agree, so that all of them stop."""
    position = {name: i for i, name in enumerate(files.names())}
    used = torch.zeros(len(position), dtype=torch.uint8, device=torch.cuda.current_device())
    missing, misshapen = [], []
    for module in modules:
        for ours, parameter, link in links(module, cfg):
            shapes = released_shapes(link, parameter.shape, is_expert=".experts." in ours)
            for name, shape in zip(link.released, shapes):
                if name not in files:
                    missing.append(name)
                    continue
                used[position[name]] = 1
                if (held := files.shape(name)) != list(shape):
                    misshapen.append(f"{name} has shape {held}, the configuration wants {list(shape)}")
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    extra = [name for name, is_used in zip(position, used.tolist()) if not is_used]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (missing, misshapen))
    faults = {
        "missing": list(dict.fromkeys(name for part in everyone for name in part[0])),
        "not part of this model": extra,
        "of another shape": list(dict.fromkeys(text for part in everyone for text in part[1])),
    }
    if problems := [f"{len(found)} tensors {what} (first: {found[0]})" for what, found in faults.items() if found]:
        raise UserError(f"{files.folder}: {'; '.join(problems)}")
