"""What a simulation found, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keye_data.simulate.measure import MIB, Measured


def draw(path: Path, name: str, found: Measured, numbers: dict[str, Any]) -> None:
    """Lengths, waits, memory and shares in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((lengths, waits), (memory, shares)) = pyplot.subplots(2, 2, figsize=(11, 7))
    lengths.hist(found.lengths, bins=min(40, 1 + found.row_tokens // 8), color="tab:blue")
    lengths.axvline(found.row_tokens, color="black", linestyle=":", label=f"a row: {found.row_tokens:,}")
    lengths.set(title="Tokens of a sample", xlabel="tokens", ylabel="samples")
    lengths.legend()

    waits.plot([1000 * wait for wait in found.waits], label="wait")
    waits.plot([1000 * spent for spent in found.decoding], label="decoding")
    waits.set(title="Each batch", xlabel="batch", ylabel="ms", yscale="symlog", ylim=(0, None))
    waits.legend()

    memory.plot([rss / MIB for rss in found.main_rss], label="main process")
    if any(found.worker_rss):
        memory.plot([rss / MIB for rss in found.worker_rss], label="largest worker")
    memory.set(title="Memory", xlabel="batch", ylabel="MiB resident", ylim=(0, None))
    memory.legend()

    sources = numbers["sources"]
    names = [Path(source).name for source in sources]
    shares.barh(range(len(names)), [one["share"] for one in sources.values()], color="tab:green")
    shares.set_yticks(range(len(names)), names)
    shares.set(title="Share of samples by source", xlim=(0, 1))

    fill = "" if numbers["fill"] is None else f"rows {numbers['fill']:.1%} full, "
    skipped = sum(numbers["skipped"].values())
    figure.suptitle(f"{name}: {found.samples:,} samples, {fill}{skipped:,} skipped")
    for axis in (lengths, waits, memory):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
