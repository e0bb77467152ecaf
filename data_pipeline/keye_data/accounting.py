"""What became of the samples: skipped ones by name and reason, and how far each source has been read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keye_data.sample import Batch


@dataclass
class Skipped:
    """A sample that could not be used."""

    key: str  # names it: source, shard and key, as in Batch.keys
    source: str
    reason: str  # short, for counting
    message: str  # the whole sentence
    masked: bool = False  # found out after packing: it keeps its place in the batch, and nothing is learnt from it


@dataclass
class Account:
    """Samples by source since the beginning of a run; sums over ranks, and what checkpoints keep, are plain numbers.

    A sample counts when its batch is delivered, used or skipped: what waits in a buffer does not, and a run that goes on
    from a checkpoint counts nothing twice.
    """

    consumed: dict[str, int] = field(default_factory=dict)  # source -> samples in batches, masked ones among them
    skipped: dict[str, int] = field(default_factory=dict)  # source -> samples left out of batches
    reasons: dict[str, int] = field(default_factory=dict)  # reason -> samples, left out or masked

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Account:
        batches = list(batches)
        bad = [one for batch in batches for one in batch.bad]
        return cls(
            consumed=dict(Counter(source for batch in batches for source in batch.sources)),
            skipped=dict(Counter(one.source for one in bad if not one.masked)),
            reasons=dict(Counter(one.reason for one in bad)),
        )

    def __add__(self, other: Account) -> Account:
        return Account(*(_sum(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))

    def epochs(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """How often each source of `sizes` (source -> samples in it) has been gone through, skipped samples included."""
        return {name: (self.consumed.get(name, 0) + self.skipped.get(name, 0)) / n for name, n in sizes.items()}


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(x for x in other if x not in one))}
