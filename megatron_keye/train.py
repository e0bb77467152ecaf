"""Train one phase of Keye from a recipe.

python -m megatron_keye.train recipes/stage1.yaml profile=mini                              # one process, a laptop
torchrun --nproc-per-node 8 -m megatron_keye.train recipes/stage1.yaml optimizer.lr=1e-5
python -m megatron_keye.train recipes/stage3.yaml --dry-run --world-size 1024               # no GPU, no data
python -m megatron_keye.train recipes/stage3.yaml --fit gpus=512 memory=80GiB                # which layouts fit, best first
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_keye.cli import EXPECTED, run_cli
from megatron_keye.config.load import load_recipe, save_resolved
from megatron_keye.config.validate import validate
from megatron_keye.errors import ElsewhereError, UserError
from megatron_keye.planning import options


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_keye.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", help="profile=mini, a.b=c ...")
    options.add_options(parser)
    args = parser.parse_intermixed_args(argv)
    options.check_options(args)
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    first = os.environ.get("RANK", "0") == "0"
    recipe = load_recipe(args.recipe, args.overrides)
    if args.fit:
        options.plan(recipe, world_size, args)
        return 0
    for warning in validate(recipe, world_size):
        if first:
            print(f"warning: {warning}")
    if args.dry_run:
        options.plan(recipe, world_size, args)
        return 0

    from megatron_keye.parallel import plan  # the heavy imports wait until the recipe is known to be good
    from megatron_keye.parallel.watchdog import Watchdog
    from megatron_keye.training.trainer import Trainer

    if first:
        make_run_dir(Path(recipe.run_dir))
    groups = plan.initialize(recipe.parallel, recipe.training.seed, recipe.training.collective_timeout_minutes)
    with Watchdog(recipe.training.collective_timeout_minutes):
        trainer = Trainer(recipe, groups)
        if first:  # not before it is known that what stands in run_dir is of this model
            save_resolved(recipe, Path(recipe.run_dir) / "resolved.yaml")
        try:
            trainer.run()
        except (*EXPECTED, ElsewhereError):
            trainer.close()
            raise
        trainer.close()
    plan.shut_down()
    return 0


def make_run_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {path} cannot be made ({error.strerror}); name another") from error


if __name__ == "__main__":
    run_cli(main)
