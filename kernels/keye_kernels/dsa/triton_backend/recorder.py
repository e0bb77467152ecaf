"""What would run on a GPU, found out without one: a Recorder stands in the launch door and starts nothing.

Kernels leave their outputs as they were allocated. Where the host goes on to read one (the number of keys in a union),
the recorder fills it in, as if the blocks' queries agreed to a chosen degree. Everything else the operators do, they do:
so the launches are those of a real call, and so is every allocation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import BLOCK
from .launch import launch as real_launch
from .union import _compact, _scatter, _words

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, with all that decides how Triton compiles it."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]  # argument -> "*bf16", "i32", "fp32" or "constexpr", in order
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def variant(self) -> tuple:
        """Equal for launches that share one compiled kernel."""
        return self.name, self.signature, self.constants, self.divisible, self.num_warps, self.num_stages


def specialise(kernel, grid, arguments: dict[str, Any], num_warps: int, num_stages: int) -> Launch:
    """Triton's own rules: the integer 1 and None become constants, pointers and integers divisible by 16 are marked."""
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        kind, fixed, aligned = _type_of(value)
        if parameter.is_constexpr or value is None or (fixed and not parameter.do_not_specialize):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, parameter.annotation_type or kind))
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            divisible.append(name)
    return Launch(kernel, tuple(grid), tuple(signature), tuple(constants), tuple(divisible), num_warps, num_stages)


def _type_of(value: Any) -> tuple[str, bool, bool]:
    """Triton's type, whether it is the integer 1, whether it is a multiple of 16."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", False, value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False, False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value == 1, value % 16 == 0
    return "fp32", False, False


def _fill_counts(arguments: dict[str, Any], union_entries: int) -> None:
    """counts [nb,segments]: each block's keys, all counted in its first segment."""
    counts, window = arguments["counts"], arguments["high"] - arguments["low"]
    counts.zero_()[:, 0] = window.clamp_max(union_entries)


def _fill_union(arguments: dict[str, Any]) -> None:
    """keys, kept [N]: as many as were counted, spread over each block's window, seen by all of its queries."""
    low, high = arguments["low"], arguments["high"]
    counts = arguments["counts"].sum(-1)
    block = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    arguments["keys"].copy_(low[block] + place * (high - low)[block] // counts[block])
    arguments["kept"].fill_(-1)


def _fill_words(arguments: dict[str, Any]) -> None:
    """pairs, as int16 [nb,W]: not 0 where a listed key is."""
    listed, width = arguments["listed"], arguments["width"]
    block = torch.arange(len(listed)) // (arguments["topk"] * BLOCK)
    at = block * width + listed - arguments["first_key"]
    arguments["pairs"].view(torch.int16)[at[listed >= 0]] = 1


class Recorder:
    """with Recorder(8192) as recorder: call operators of the Triton backend on CPU tensors; then read recorder.launches.

    union_entries: how many keys each block of 16 queries is made to look at, where its window holds so many.
    """

    def __init__(self, union_entries: int) -> None:
        self.launches: list[Launch] = []
        self._fills: dict[Any, Callable[[dict[str, Any]], None]] = {
            _words: lambda arguments: _fill_counts(arguments, union_entries),
            _compact: _fill_union,
            _scatter: _fill_words,
        }

    def __call__(self, kernel, grid, *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
        if 0 in grid:
            return
        bound = inspect.signature(kernel.fn).bind(*args, **constants)
        bound.apply_defaults()
        self.launches.append(specialise(kernel, grid, bound.arguments, num_warps, num_stages))
        fill = self._fills.get(kernel)
        if fill is not None:
            fill(bound.arguments)

    def __enter__(self) -> Recorder:
        self._standing = standing_in(self)
        self._standing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._standing.__exit__(None, None, None)


@contextmanager
def standing_in(replacement: Callable[..., None]) -> Iterator[None]:
    """Inside it every module of this backend that is loaded starts its kernels through `replacement`."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]
    doors = [module for module in modules if getattr(module, "launch", None) is real_launch]
    for module in doors:
        module.launch = replacement  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in doors:
            module.launch = real_launch  # type: ignore[attr-defined]
