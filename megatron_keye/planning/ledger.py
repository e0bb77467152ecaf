"""What a trace writes down: bytes alive, work done, bytes sent.

Bytes are counted by storage, from the operation that makes it to the moment the last reference dies, so views and
autograd's saved tensors are what they are in a real run. Sizes are bytes, work is floating-point operations.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import flop_registry

NO_TRAFFIC = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "unbind", "alias",
              "detach", "as_strided", "unsqueeze", "squeeze", "empty", "empty_like", "empty_strided", "new_empty", "chunk",
              "split_with_sizes", "unfold", "set_", "lift_fresh", "_reshape_alias", "resize_", "view_as"}  # fmt: skip


def leaves(x: Any) -> list[Any]:
    """What stands in nested lists, tuples and dictionaries."""
    if type(x) in (list, tuple):
        return [leaf for item in x for leaf in leaves(item)]
    return leaves(list(x.values())) if type(x) is dict else [x]


class Work(NamedTuple):
    """One kernel: what it multiplies and what it reads and writes."""

    kind: str  # "matrix" | "attention" | "scores" | "memory"
    flops: float
    bytes: int


class Sent(NamedTuple):
    """One collective: `bytes` is the larger of what goes in and what comes out on this rank."""

    what: str
    ranks: tuple[int, ...]
    bytes: int


class Phase:
    """One part of a step: its peak beside weights and gradient buffers, and all work and traffic in it."""

    def __init__(self) -> None:
        self.peak = 0
        self.at_peak: dict[str, int] = {}  # bytes by place, summing to the peak
        self.work: Counter[Work] = Counter()
        self.sent: Counter[Sent] = Counter()


class Ledger:
    """`place` names the part of the model that is running; what is made there is counted there."""

    def __init__(self) -> None:
        self.live, self.place = 0, ""
        self.by_place: defaultdict[str, int] = defaultdict(int)
        self._known: dict[int, Any] = {}
        self._stack: list[Phase] = []
        self.count_from_here()
        self.begin_step()

    def count_from_here(self) -> None:
        """What is alive now is no activation: weights and gradient buffers."""
        self.base, self.base_by_place = self.live, dict(self.by_place)

    def begin_step(self) -> None:
        self.phases: dict[str, Phase] = {}

    @property
    def risen(self) -> int:
        """Bytes alive beside weights and gradient buffers."""
        return self.live - self.base

    @contextmanager
    def within(self, name: str) -> Iterator[Phase]:
        """What happens inside is of this phase, and not of one around it."""
        self._stack.append(self.phases.setdefault(name, Phase()))
        try:
            yield self._stack[-1]
        finally:
            self._stack.pop()

    @property
    def phase(self) -> Phase | None:
        return self._stack[-1] if self._stack else None

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        outer, self.place = self.place, place
        try:
            yield
        finally:
            self.place = outer

    def note(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> None:
        made = [x for x in leaves(out) if isinstance(x, Tensor)]
        for x in made:
            self.hold(x)
        name = func.overloadpacket.__name__
        if self.phase is None or name in NO_TRAFFIC or not any(x.is_meta for x in (*tensors, *made)):
            return
        moved = sum(x.numel() * x.element_size() for x in (*tensors, *made))
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
        self.work(Work("matrix" if flops else "memory", flops, moved))

    def work(self, work: Work) -> None:
        if self.phase is not None:
            self.phase.work[work] += 1

    def collective(self, what: str, ranks: list[int], args: Any) -> None:
        sizes = [sum(x.numel() * x.element_size() for x in leaves(arg) if isinstance(x, Tensor)) for arg in args[:2]]
        if self.phase is not None and len(ranks) > 1:
            self.phase.sent[Sent(what.strip("_").removesuffix("_base"), tuple(ranks), max(sizes))] += 1

    def hold(self, x: Tensor) -> None:
        """Counts a tensor's storage from now on, once."""
        storage = x.untyped_storage()
        key, size, place = storage._cdata, storage.nbytes(), self.place
        if key in self._known:
            return
        self.live += size
        self.by_place[place] += size
        self._known[key] = weakref.finalize(storage, self._let_go, key, size, place)
        phase = self.phase
        if phase is not None and self.risen > phase.peak:
            phase.peak = self.risen
            phase.at_peak = {p: n for p, b in self.by_place.items() if (n := b - self.base_by_place.get(p, 0))}

    def _let_go(self, key: int, size: int, place: str) -> None:
        self.live -= size
        self.by_place[place] -= size
        del self._known[key]
