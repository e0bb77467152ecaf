"""Shows what a shard folder holds.

  python tools/inspect_shards.py DIR                                         a table of its first samples
  python tools/inspect_shards.py DIR --sample 17 --sheet sheet.png           one sample, and its pictures and frames as a PNG

The table: key, kinds of media, seconds of film, tokens (where they were counted when the shards were built), first words.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))  # works uninstalled too

from keye_data.errors import DataError
from keye_data.shards.inspect import Sample, samples

SHEET = 8  # samples on a sheet, unless told


def _table(chosen: list[Sample], wide: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    budgets = list(dict.fromkeys(name for sample in chosen for name in sample.line.get("tokens", {})))
    table = Table("shard", "key", "media", "seconds", *(f"tokens {name}" for name in budgets), "words")
    for sample in chosen:
        counts = sample.line.get("tokens", {})
        try:
            media, text = sample.media, sample.text
            lengths = [sample.seconds(name) for kind, name in dict.fromkeys(media) if kind == "video"]
        except DataError as error:
            media, text, lengths = [], f"cannot be used: {error}", []
        kinds = [f"{kind} x {count}" for kind in ("image", "video") if (count := sum(k == kind for k, _ in media))]
        tokens = ["too long" if counts.get(name, 0) is None else str(counts.get(name, "")) for name in budgets]
        words = " ".join(text.split())
        table.add_row(
            sample.shard,
            sample.key,
            ", ".join(kinds) or "-",
            ", ".join(f"{seconds:.1f}" for seconds in lengths),
            *tokens,
            Text(words if wide else words[:60]),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--sample", metavar="N", help="only this one: its number in the folder from 0, or its key")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="samples in the table; %(default)s")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help=f"a contact sheet of the sample, or of the first {SHEET}"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    try:
        if given.limit < 1:
            raise DataError(f"--limit {given.limit}: it must be at least 1")
        if given.sheet and given.sheet.suffix.lower() != ".png":
            raise DataError(f"--sheet {given.sheet}: give it a name that ends in .png")
        every = samples(given.folder)
        if given.sample is None:
            chosen = list(islice(every, given.limit))
        else:
            numbered = ((number, sample) for number, sample in enumerate(every))
            chosen = list(islice((s for i, s in numbered if given.sample in (str(i), s.key)), 1))
            if not chosen:
                raise DataError(f"{given.folder}: it has no sample {given.sample}")
        _table(chosen, wide=given.sample is not None)
        if given.sheet:
            from keye_data.shards.sheet import contact_sheet

            count = contact_sheet(chosen[:SHEET], given.sheet)
            print(f"{given.sheet}: {count} pictures and frames")
    except (DataError, OSError) as error:
        if given.debug:
            raise
        print(f"inspect_shards: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
