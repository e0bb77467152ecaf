"""Where two runs part.

    python tools/loss_compare.py runs/a runs/b                       # run folders, or metrics.jsonl files
    python tools/loss_compare.py tests/megatron_keye/golden/stage1.jsonl runs/mine --early 1e-4 --steps 5 --late 1e-2

Exit code 0 where the losses agree, 1 where they part.
"""

from __future__ import annotations

import argparse

from megatron_keye.cli import run_cli
from megatron_keye.parting import Tolerance, compare, read_run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="loss_compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", help="a run_dir, or a metrics.jsonl")
    parser.add_argument("b", help="another")
    parser.add_argument("--early", type=float, default=Tolerance.early, help="relative difference allowed at first")
    parser.add_argument("--steps", type=int, default=Tolerance.steps, help="how many steps are the first")
    parser.add_argument("--late", type=float, default=Tolerance.late, help="relative difference allowed afterwards")
    args = parser.parse_args(argv)
    a, b = read_run(args.a), read_run(args.b)
    found = compare(a, b, Tolerance(args.early, args.steps, args.late))
    print(f"{found.steps} steps in both ({len(a)} in {args.a}, {len(b)} in {args.b})")
    for key, (by, step) in found.greatest.items():
        print(f"  {key}: at most {by:.2e} apart, at step {step}")
    if found.data is not None:
        print(f"data part at {found.data}")
    print(f"losses part at {found.loss}" if found.loss is not None else "losses agree")
    return 0 if found.loss is None else 1


if __name__ == "__main__":
    run_cli(main)
