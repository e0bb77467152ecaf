"""Builds WebDataset shards that the loader reads:  python tools/build_shards.py SOURCE --out DIR

SOURCE is a JSONL file of conversations ({"messages": [...]}, media paths relative to the file) or documents ({"text": ...}),
a folder with such files, or a folder of pictures and clips with captions in .txt files of the same names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))  # works uninstalled too

from keye_data.errors import DataError
from keye_data.shards import build_shards


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("samples", total=None)
            samples, shards = build_shards(
                options.source, options.out, options.samples_per_shard, lambda: progress.advance(task)
            )
    except (DataError, OSError) as error:
        if options.debug:
            raise
        print(f"build_shards: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {samples} samples in {shards} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
