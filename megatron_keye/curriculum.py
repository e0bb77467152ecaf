"""Train phase after phase, each from the weights that the last one left; stopped anywhere, the same command goes on.

python -m megatron_keye.curriculum recipes/curriculum.yaml profile=mini
python -m megatron_keye.curriculum recipes/curriculum.yaml profile=mini --dry-run          # commands and what is done, nothing run
python -m megatron_keye.curriculum recipes/curriculum.yaml profile=mini stage1.training.steps=100 all.checkpoint.keep=1
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings

from megatron_keye.cli import run_cli
from megatron_keye.config.curriculum import CurriculumConfig, Phase, load_curriculum
from megatron_keye.errors import UserError
from megatron_keye.progress import print_table, row_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="megatron_keye.curriculum", description=__doc__.splitlines()[0])
    parser.add_argument("curriculum", help="a YAML file that lists recipes, see recipes/curriculum.yaml")
    parser.add_argument("overrides", nargs="*", help="profile=mini, stage1.a.b=c, all.a.b=c, root=runs ...")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is done; train nothing")
    args = parser.parse_intermixed_args(argv)
    config, phases = load_curriculum(args.curriculum, args.overrides)
    done = finished_phases(phases)
    for i, phase in enumerate(phases, start=1):
        steps = phase.recipe.training.steps
        print(f"\nphase {i} of {len(phases)}: {phase.name}, {steps} steps, {phase.recipe.run_dir}", flush=True)
        for warning in phase.warnings:
            print(f"  warning: {warning}")
        if i <= done:
            print("  finished, skipped")
            continue
        print(f"  {shlex.join(shown(command(config, phase)))}", flush=True)
        if not args.dry_run and not run(config, phase):
            break
    rows = [row for row in map(row_of, phases) if row is not None]
    if rows:
        print_table(rows)
    return 0


def finished_phases(phases: list[Phase]) -> int:
    """How many are finished, from the first on. Raises UserError where a phase was trained from one that is not."""
    reached = [iteration(phase) for phase in phases]
    done = next((i for i, p in enumerate(phases) if reached[i] < p.recipe.training.steps), len(phases))
    for later, at in zip(phases[done + 1 :], reached[done + 1 :]):
        if at:
            unfinished = phases[done]
            raise UserError(
                f"{later.recipe.run_dir} has been trained to step {at} from a phase that is not finished: {unfinished.recipe.run_dir} "
                f"is at step {reached[done]} of {unfinished.recipe.training.steps}; remove what came after it, or set another root"
            )
    return done


def iteration(phase: Phase) -> int:
    """Of its newest complete checkpoint; 0 for none."""
    with warnings.catch_warnings():  # of Megatron, about what is not installed: the runs say that
        warnings.simplefilter("ignore")
        from megatron_keye.training.checkpoint import newest

    found = newest(phase.checkpoints)
    return int(found.name.rpartition("_")[2]) if found else 0


def command(config: CurriculumConfig, phase: Phase) -> list[str]:
    """The launcher's words, then the phase's."""
    try:
        text = config.launch.format(nodes=phase.nodes, ranks=config.ranks, host=socket.gethostname())
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"launch = {config.launch!r} can be filled in with nodes, ranks and host, not {error}"
        ) from error
    words = shlex.split(text)
    own = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}
    return [*own.get(words[0], words[:1]), *words[1:], *phase.words] if words else [sys.executable, *phase.words]


def shown(words: list[str]) -> list[str]:
    """As a user would type it."""
    words = ["python" if word == sys.executable else word for word in words]
    return ["torchrun", *words[3:]] if words[:3] == ["python", "-m", "torch.distributed.run"] else words


def run(config: CurriculumConfig, phase: Phase) -> bool:
    """One phase to its end; False where a signal stopped it. Raises UserError where it ends before its last step by itself."""
    began = time.perf_counter()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        process = subprocess.Popen(command(config, phase), env=environment)
    except OSError as error:
        raise UserError(f"{phase.name} cannot be started: {error}; set launch to what starts it here") from error
    told: list[int] = []

    def hand_on(number: int, _) -> None:
        told.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was interrupted as well
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    reached, steps = iteration(phase), phase.recipe.training.steps
    if reached >= steps and code == 0:
        print(f"  {phase.name} finished after {time.perf_counter() - began:.0f} s", flush=True)
        return not told
    where = f"its newest checkpoint at step {reached} of {steps}; the same command goes on from there"
    if told:
        print(f"  stopped by {signal.Signals(told[0]).name}, {where}", flush=True)
        return False
    raise UserError(f"{phase.name} ended with exit code {code}, {where}")


if __name__ == "__main__":
    run_cli(main)
