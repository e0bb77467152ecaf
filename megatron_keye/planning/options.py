"""The planner's options of `megatron_keye.train`, kept apart so that a run does not load the planner."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError

HELP = {
    "--world-size": "for --dry-run: how many ranks to plan for",
    "--json": "for --dry-run: write the plan there too",
    "--picture": "for --dry-run: draw memory by part there (.png, .svg)",
    "--machine": "for --dry-run: h100 or h200 (default)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print layout, sizes and the time of a step; train nothing"
    )
    parser.add_argument("--world-size", type=int, help=HELP["--world-size"])
    parser.add_argument("--json", type=Path, help=HELP["--json"])
    parser.add_argument("--picture", type=Path, help=HELP["--picture"])
    parser.add_argument("--machine", help=HELP["--machine"])
    parser.add_argument(
        "--fit",
        nargs="+",
        metavar="KEY=VALUE",
        help="gpus=512 memory=80GiB: rank the layouts that fit; last on the line",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option without the one it belongs to."""
    for option in ("--world-size", "--json", "--picture", "--machine"):
        given = getattr(args, option.strip("-").replace("-", "_")) is not None
        if given and not (args.dry_run or (args.fit and option != "--world-size" and option != "--picture")):
            raise UserError(f"{option} belongs to --dry-run; a run takes its ranks from torchrun and writes to run_dir")
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size {args.world_size} must be 1 or more")


def plan(recipe: Recipe, world_size: int, args: argparse.Namespace) -> None:
    """What --fit or --dry-run ask for."""
    from megatron_keye.planning.hardware import machine

    hardware = machine(args.machine or "h200")
    if args.fit:
        from megatron_keye.planning.fit import fit, print_fit

        print_fit(fit(recipe, *fit_words(args.fit), hardware), args.json)
        return
    from megatron_keye.planning.dry_run import dry_run

    dry_run(recipe, world_size, args.json, args.picture, hardware)


def fit_words(words: list[str]) -> tuple[int, int]:
    """["gpus=512", "memory=80GiB"] -> (512, bytes). Raises UserError for anything else."""
    found = dict(word.partition("=")[::2] for word in words)
    unknown = [word for word in words if word.partition("=")[0] not in ("gpus", "memory")]
    if unknown or set(found) != {"gpus", "memory"}:
        what = f"{unknown[0]!r} is neither" if unknown else "both are needed"
        raise UserError(f"--fit takes gpus=N and memory=NGiB, {what}; put overrides of the recipe before --fit")
    number = found["memory"].removesuffix("GiB")
    try:
        gpus, memory = int(found["gpus"]), float(number)
    except ValueError as error:
        raise UserError(f"--fit {' '.join(words)}: write numbers, as in gpus=512 memory=80GiB") from error
    if number == found["memory"] or gpus < 1 or not 0 < memory < 1e6:
        raise UserError(f"--fit {' '.join(words)}: gpus is 1 or more, memory is given in GiB, as in memory=80GiB")
    return gpus, int(memory * 2**30)
