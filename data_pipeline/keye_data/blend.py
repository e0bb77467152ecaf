"""How often samples are drawn from each source."""

from __future__ import annotations

from collections.abc import Sequence

from keye_data.errors import DataError
from keye_data.settings import SourceConfig

KINDS = ("short", "long")


def shares(sources: Sequence[SourceConfig], long_short_ratio: float | None) -> list[float]:
    """Of the samples drawn, the part that comes from each source; they sum to 1.

    `long_short_ratio` is samples of long sources for each sample of short ones, within which the weights decide; None
    leaves all to the weights. DataError for a weight or ratio that is not above 0, an unknown kind, and a ratio without
    sources of both kinds.
    """
    for source in sources:
        if not source.weight > 0:
            raise DataError(f"data.sources: {source.path} has weight {source.weight}; it must be above 0")
        if source.kind not in KINDS:
            raise DataError(f"data.sources: {source.path} has kind {source.kind!r}; it must be {' or '.join(KINDS)}")
    sums = {kind: sum(source.weight for source in sources if source.kind == kind) for kind in KINDS}
    if long_short_ratio is None:
        return [source.weight / sum(sums.values()) for source in sources]
    if not long_short_ratio > 0:
        raise DataError(f"data.long_short_ratio = {long_short_ratio} must be above 0; leave out the sources instead")
    for kind in KINDS:
        if not sums[kind]:
            raise DataError(
                f"data.long_short_ratio = {long_short_ratio} needs sources of both kinds, and none has kind: {kind}"
            )
    part = {"long": long_short_ratio / (1 + long_short_ratio), "short": 1 / (1 + long_short_ratio)}
    return [part[source.kind] * source.weight / sums[source.kind] for source in sources]
