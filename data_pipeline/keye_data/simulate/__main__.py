"""Runs the loader of a recipe alone, as one data-parallel rank would.

  python -m keye_data.simulate recipes/stage1.yaml profile=mini
  python -m keye_data.simulate recipes/stage3.yaml --ranks 64 --samples 5000 data.workers=8 --png loader.png

It reads, packs and decodes as training does, without model: if it waits here, training waits. Samples that cannot be used
are listed with their reasons.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keye_data.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file as training takes it")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, and profile=NAME")
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="how many to read (%(default)s)")
    parser.add_argument("--once", action="store_true", help="stop after one pass over every source")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="be the first of R data-parallel ranks (1)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw lengths, waits, memory and shares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument(
        "--skipped", type=Path, metavar="FILE", help="write every skipped sample, one JSON object a line"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Raises DataError."""
    given = _parser().parse_intermixed_args(arguments)
    from dataclasses import asdict

    import torch

    from keye_data.errors import DataError
    from keye_data.loader import Loader
    from keye_data.processor import Processor
    from keye_data.recipe import read_recipe
    from keye_data.simulate.measure import Ids, measure, summary
    from keye_data.simulate.picture import draw
    from keye_data.simulate.table import print_summary
    from keye_data.tokenizer import load_tokenizer

    for name in ("samples", "ranks"):
        if getattr(given, name) < 1:
            raise DataError(f"--{name} {getattr(given, name)}: it must be at least 1")
    for file in (given.png, given.json, given.skipped):
        if file is not None and not file.parent.is_dir():
            raise DataError(f"{file}: the folder {file.parent} does not exist")
    torch.set_num_threads(1)  # as in a rank that shares its machine with others
    recipe = read_recipe(given.recipe, given.overrides)
    processor = Processor(load_tokenizer(recipe.data.tokenizer), recipe.data)
    loader = Loader(
        recipe.data,
        processor,
        rank=0,
        world_size=given.ranks,
        micro_batch_size=recipe.micro_batch_size,
        seed=recipe.seed,
        repeat=not given.once,
    )
    log = logging.getLogger("keye_data")
    level = log.level
    log.setLevel(logging.ERROR)  # what was skipped is said once, at the end
    try:
        ids = Ids(processor.start_id, processor.image_token_id, processor.video_token_id)
        found = _watched(lambda progress: measure(loader, given.samples, ids, progress), given.samples)
    finally:
        loader.close()
        log.setLevel(level)
    numbers: dict[str, Any] = {"recipe": str(given.recipe), **summary(found, loader.source_sizes)}
    print_summary(recipe.name, numbers, found.bad)
    if given.json is not None:
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if given.skipped is not None:
        given.skipped.write_text("".join(json.dumps(asdict(one)) + "\n" for one in found.bad), encoding="utf-8")
    if given.png is not None:
        draw(given.png, recipe.name, found, numbers)


def _watched(work: Any, total: int) -> Any:
    """`work(progress)` under a progress bar on stderr, which only a terminal shows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("samples", total=total)
        return work(lambda count: bar.advance(task, count))


if __name__ == "__main__":
    from keye_data.errors import DataError

    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
