"""Files of the released format: sharded safetensors with an index, read and written tensor by tensor.

Names are those of the per-expert layout everywhere. The fused layout, in which a layer's experts are stacked and
transposed (`gate_up_proj` [E, hidden, 2 ffn], `down_proj` [E, ffn, hidden]), exists only inside the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_keye.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
FUSED = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)")
SEPARATE = re.compile(r"(.+\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Checkpoint:
    """A folder of released weights. Raises UserError for a file that is missing, cut short or at odds with its index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._where = self._locate()  # name in the files -> file
        self._views: dict[str, tuple[str, int, str]] = {}  # canonical name -> (name in the files, expert, part)
        for stored in self._where:
            for name, expert, part in self._names_of(stored):
                if name in self._views:
                    raise UserError(
                        f"{self._where[stored]}: {stored} holds {name}, which {self._views[name][0]} does too"
                    )
                self._views[name] = (stored, expert, part)

    def names(self) -> list[str]:
        """Canonical names, in the order of the files."""
        return list(self._views)

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def get(self, name: str) -> torch.Tensor:
        """A tensor by its canonical name, contiguous, in the stored dtype."""
        stored, expert, part = self._find(name)
        try:
            if expert < 0:
                return self._file(self._where[stored]).get_tensor(stored)
            return _unfused(self._slice(stored)[expert], part).contiguous()
        except SafetensorError as error:
            raise UserError(
                f"{self._where[stored]}: {stored} cannot be read ({error}); fetch the file again"
            ) from error

    def shape(self, name: str) -> list[int]:
        stored, expert, part = self._find(name)
        shape = list(self._slice(stored).get_shape())
        if expert < 0:
            return shape
        rows, columns = shape[1:]
        return [columns if part == "down_proj" else columns // 2, rows]

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for integers and quantised formats."""
        stored = self._find(name)[0]
        dtype = self._slice(stored).get_dtype()
        if dtype not in DTYPES:
            raise UserError(f"{self._where[stored]}: {stored} is {dtype}; give a checkpoint of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def common_dtype(self) -> torch.dtype:
        """The one dtype of all tensors. Raises UserError where they differ."""
        names = self.names()
        if not names:
            raise UserError(f"{self.folder}: it holds no tensor")
        first = self.dtype(names[0])
        for name in names[1:]:
            if (other := self.dtype(name)) is not first:
                raise UserError(
                    f"{self.folder}: {names[0]} is {first} but {name} is {other}; choose one dtype to load in"
                )
        return first

    # ---- inside

    def _names_of(self, stored: str) -> list[tuple[str, int, str]]:
        """(canonical name, expert or -1, part) of what a tensor in the files holds."""
        stack = FUSED.fullmatch(stored)
        if stack is None:
            return [(stored, -1, "")]
        shape = self._slice(stored).get_shape()
        if len(shape) != 3:
            raise UserError(f"{self._where[stored]}: {stored} has shape {shape}; fused experts have three dimensions")
        parts = ("gate_proj", "up_proj") if stack[2] == "gate_up_proj" else ("down_proj",)
        return [(f"{stack[1]}{e}.{part}.weight", e, part) for e in range(shape[0]) for part in parts]

    def _find(self, name: str) -> tuple[str, int, str]:
        if name not in self._views:
            raise UserError(f"{self.folder}: tensor {name} is missing")
        return self._views[name]

    def _locate(self) -> dict[str, Path]:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder")
        index = self.folder / INDEX
        if not index.is_file():
            single = self.folder / SINGLE
            if not single.is_file():
                raise UserError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there; give a Hugging Face folder")
            return dict.fromkeys(self._file(single).keys(), single)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: self._inside(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from error
        for path in dict.fromkeys(files.values()):
            listed = {name for name, file in files.items() if file == path}
            held = set(self._file(path).keys())
            if listed - held:
                raise UserError(f"{index}: {min(listed - held)} is said to be in {path.name}, which does not hold it")
            if held - listed:
                raise UserError(f"{path}: {min(held - listed)} is not in {INDEX}; the two do not belong together")
        return files

    def _inside(self, file: str) -> Path:
        if Path(file).name != file:
            raise UserError(f"{self.folder / INDEX}: {file!r} is no file name; shards lie beside their index")
        return self.folder / file

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            if not path.is_file():
                raise UserError(f"{path} is missing; fetch it again")
            try:
                self._files[path] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError, struct.error) as error:
                raise UserError(f"{path} is cut short or damaged ({error}); fetch it again") from error
        return self._files[path]

    def _slice(self, stored: str) -> Any:
        return self._file(self._where[stored]).get_slice(stored)


def _unfused(stacked: torch.Tensor, part: str) -> torch.Tensor:
    """One expert's matrix out of the fused layout, whose weights multiply from the right."""
    if part == "down_proj":
        return stacked.T
    gate, up = stacked.chunk(2, dim=-1)
    return (gate if part == "gate_proj" else up).T


def fused(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Per-expert matrices -> stacked ones, a layer at a time; everything else as it comes."""
    layer, parts = "", {}  # type: tuple[str, dict[tuple[int, str], torch.Tensor]]
    for name, tensor in tensors:
        expert = SEPARATE.fullmatch(name)
        if (expert[1] if expert else "") != layer:
            yield from _stacked(layer, parts)
            layer, parts = expert[1] if expert else "", {}
        if expert:
            parts[int(expert[2]), expert[3]] = tensor
        else:
            yield name, tensor
    yield from _stacked(layer, parts)


def _stacked(layer: str, parts: dict[tuple[int, str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if parts:
        experts = range(len(parts) // 3)
        pairs = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]).T for e in experts]
        yield f"{layer}gate_up_proj", torch.stack(pairs)
        yield f"{layer}down_proj", torch.stack([parts[e, "down_proj"].T for e in experts])


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    experts: str = "fused",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Tensors by canonical name -> a folder of shards and their index, which appears whole or not at all."""
    with publishing(folder) as draft:
        write_tensors(draft, tensors, experts, shard_bytes)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], experts: str = "fused", shard_bytes: int = SHARD_BYTES
) -> None:
    """As `write`, into a folder that exists. Holds one shard (and a layer's experts) in memory."""
    if experts not in ("fused", "separate"):
        raise UserError(f"experts = {experts!r} is neither 'fused' nor 'separate'")
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_file(shard, str(folder / f"{len(shards)}.part"), metadata={"format": "pt"})
            shards.append(list(shard))
            shard, size = {}, 0

    for name, tensor in fused(tensors) if experts == "fused" else tensors:
        if size and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}.part", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def publishing(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends and is gone when the block fails.

    Raises UserError where `folder` holds something already, and for a disk that refuses to be written to.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; remove it or name another folder")
    draft = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written ({error}); nothing was left behind; free space there or name another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
