"""Files of the released format: sharded safetensors with an index, read and written tensor by tensor.

Names are those of the per-expert layout everywhere. The fused layout, in which a layer's experts are stacked and
transposed (`gate_up_proj` [E, hidden, 2 ffn], `down_proj` [E, ffn, hidden]), exists only inside the files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_keye.errors import UserError
from megatron_keye.journal import Advance, Journal, finished_files, forget, ignore
from megatron_keye.model.hf_stream import Lazy, Named, header_of, lazy, shards, write_shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
FUSED = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)")
SEPARATE = re.compile(r"(.+\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Source(Protocol):
    """Released tensors by canonical name."""

    folder: Path

    def names(self) -> list[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> list[int]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """A folder of released weights. Raises UserError for a file that is missing, cut short or at odds with its index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._where = self._locate()  # name in the files -> file
        self._views: dict[str, tuple[str, int, str]] = {}  # canonical name -> (name in the files, expert, part)
        self._half: dict[
            tuple[str, int, str], torch.Tensor
        ] = {}  # of the last gate_up_proj: what was not asked for yet
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
            return self._unfused(stored, expert, part)
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
        if shape[2] % len(parts):
            raise UserError(f"{self._where[stored]}: {stored} has shape {shape}; gate and up must be of equal width")
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
        if (self.folder / SINGLE).exists():  # transformers would read the one file, and these may be other weights
            raise UserError(f"{self.folder}: both {INDEX} and {SINGLE} are there; remove the one that is not meant")
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

    def _unfused(self, stored: str, expert: int, part: str) -> torch.Tensor:
        """One expert's matrix out of the fused layout, whose weights multiply from the right."""
        if (stored, expert, part) in self._half:
            return self._half.pop((stored, expert, part))
        turned = self._slice(stored)[expert].T.contiguous()
        if part == "down_proj":
            return turned
        # Gate and up, mostly asked for in turn: a whole matrix turns four times as fast as its halves.
        halves = dict(zip(("gate_proj", "up_proj"), turned.chunk(2)))
        mine = halves.pop(part)
        self._half = {(stored, expert, other): half for other, half in halves.items()}
        return mine


def fused(tensors: Iterable[Named]) -> Iterator[Named]:
    """Per-expert matrices -> stacked ones, made expert by expert; everything else as it comes."""
    layer, parts = "", {}  # type: tuple[str, dict[tuple[int, str], Lazy]]
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


def _stacked(layer: str, parts: dict[tuple[int, str], Lazy]) -> Iterator[Named]:
    if not parts:
        return
    experts = range(len(parts) // 3)
    dtype, (ffn, hidden) = parts[0, "gate_proj"].dtype, parts[0, "gate_proj"].shape

    # Buffers for all experts: large blocks that come and go would leave the heap in pieces, and it would grow. Of what is
    # given away there are two, in turn.
    def pairs() -> Iterator[torch.Tensor]:
        rows, both = torch.empty(2 * ffn, hidden, dtype=dtype), torch.empty(2, hidden, 2 * ffn, dtype=dtype)
        for e in experts:
            rows[:ffn] = parts[e, "gate_proj"].get()
            rows[ffn:] = parts[e, "up_proj"].get()
            yield both[e % 2].copy_(rows.T)  # a whole matrix turns four times as fast as its halves

    def downs() -> Iterator[torch.Tensor]:
        down = torch.empty(2, ffn, hidden, dtype=dtype)
        for e in experts:
            yield down[e % 2].copy_(parts[e, "down_proj"].get().T)

    yield f"{layer}gate_up_proj", Lazy((len(experts), hidden, 2 * ffn), dtype, pairs)
    yield f"{layer}down_proj", Lazy((len(experts), ffn, hidden), dtype, downs)


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, Lazy | torch.Tensor]],
    experts: str = "fused",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Tensors by canonical name -> a folder of shards and their index, which appears whole or not at all."""
    with publishing(folder) as draft:
        write_tensors(draft, tensors, experts, shard_bytes)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Lazy | torch.Tensor]],
    experts: str = "fused",
    shard_bytes: int = SHARD_BYTES,
    journal: Journal | None = None,
    advance: Advance = ignore,
) -> None:
    """As `write`, into a folder that exists; shards that `journal` knows as finished stay. `advance` gets bytes."""
    if experts not in ("fused", "separate"):
        raise UserError(f"experts = {experts!r} is neither 'fused' nor 'separate'")
    named = ((name, tensor if isinstance(tensor, Lazy) else lazy(tensor)) for name, tensor in tensors)
    runs = shards(fused(named) if experts == "fused" else named, shard_bytes)
    journal = journal or Journal(folder)
    weight_map, total = {}, 0
    for i, run in enumerate(runs):
        file = f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors"
        if journal.finished(file, advance) is None:
            with journal.writing(file, []) as stream:
                write_shard(stream, run, advance)
        for name, size in header_of(folder / file):  # the index says what the files hold, not what was meant
            weight_map[name], total = file, total + size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def publishing(folder: str | Path, resume: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends and is gone when the block fails.

    With `resume` it stays where a Journal in it tells of finished files, and the next block for the same folder finds it.
    All is on disk before the name appears. Raises UserError where `folder` holds something already, for a disk that
    refuses to be written to, and for a file that cannot be read meanwhile.
    """
    for part in (Path(folder), *Path(folder).parents):
        if part.is_symlink() and not part.exists():
            raise UserError(f"{part} is a link to {part.readlink()}, which is not there; name a folder")
    folder, kept = Path(folder).resolve(), 0
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; remove it or name another folder")
    draft = folder.with_name(f".{folder.name}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        draft.mkdir(parents=True, exist_ok=True)
        with _claim(draft):
            try:
                if not resume:
                    _empty(draft)
                yield draft
                forget(draft)
                for path in (*(file for file in draft.rglob("*") if file.is_file()), draft):
                    _sync(path)
                os.replace(draft, folder)
                _sync(folder.parent)
            finally:
                kept = finished_files(draft) if resume else 0
                if not kept:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        left = f"{kept} finished files are kept in {draft}" if kept else "nothing was left behind"
        if error.filename is not None and not _on_the_way(Path(error.filename), draft):
            raise UserError(
                f"{error.filename} could not be read ({error}), so {folder} was not written; {left}; put that right and "
                "give the command again"
            ) from error
        advice = "free space, and the same command goes on from there" if kept else "free space or name another folder"
        raise UserError(f"{folder} could not be written ({error}); {left}; {advice}") from error
    finally:
        if not folder.exists():
            with contextlib.suppress(OSError):  # something is in one of them
                for parent in made:
                    parent.rmdir()


def _on_the_way(path: Path, draft: Path) -> bool:
    """It is the draft, in it, or above it: where things are written."""
    path = path.absolute()
    return path.is_relative_to(draft) or draft.is_relative_to(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel lets go of it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another process; wait for it, or stop it") from error
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
