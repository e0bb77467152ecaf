"""Between Hugging Face folders and this stack's checkpoints, bit for bit:

python tools/convert.py import --hf DIR --out CKPT                        # weights for training.init_from=CKPT
python tools/convert.py export --ckpt CKPT --out DIR [--experts fused|separate] [--dtype bf16|fp32] [--tokenizer PATH]
python tools/convert.py verify --hf DIR --ckpt CKPT [--dtype bf16|fp32]   # exit code 1 where anything differs
python tools/convert.py names --preset keye_vl2_30b_a3b --tp 4 --ep 8 --pp 4

CKPT is a run's folder or its checkpoints folder (the newest iteration), or an iter_* folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "data_pipeline")]  # works uninstalled too

from megatron_keye.cli import run_cli  # noqa: E402  (after the path is set)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dtype: dict[str, Any] = dict(
        choices=("bf16", "fp32"), help="as stored if left out; fp32 of a bf16 run: the optimizer's master copies"
    )
    experts: dict[str, Any] = dict(
        choices=("fused", "separate"), help="a layer's experts in two tensors, or one by one; default: as released"
    )

    command = commands.add_parser("import", help="Hugging Face folder -> checkpoint")
    command.add_argument("--hf", type=Path, required=True, metavar="DIR")
    command.add_argument("--out", type=Path, required=True, metavar="CKPT")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="as stored if left out")

    command = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    command.add_argument("--ckpt", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--experts", **experts)
    command.add_argument("--dtype", **dtype)
    command.add_argument("--tokenizer", metavar="PATH", help="the run's own if left out")

    command = commands.add_parser("verify", help="compare a Hugging Face folder with a checkpoint, tensor by tensor")
    command.add_argument("--hf", type=Path, required=True, metavar="DIR")
    command.add_argument("--ckpt", type=Path, required=True)
    command.add_argument("--dtype", **dtype)

    command = commands.add_parser("names", help="name, shape and dtype of every tensor that an export would write")
    command.add_argument("--preset", required=True)
    command.add_argument("--experts", default="fused", choices=experts["choices"])
    for name, what in (("tp", "tensor"), ("ep", "expert"), ("pp", "pipeline")):
        command.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what}-parallel ranks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.command == "names":
        from megatron_keye.conversion.layout import exported_shapes

        for name, shape in exported_shapes(args.preset, args.experts, args.tp, args.ep, args.pp):
            print(f"{name}\t[{','.join(map(str, shape))}]\tbf16")
        return 0

    from megatron_keye.conversion import commands

    dtype = commands.DTYPES[args.dtype] if args.dtype else None
    if args.command == "import":
        folder = commands.import_hf(args.hf, args.out, dtype, progress_bar)
        print(f"{folder}: weights of {args.hf}; start from them with training.init_from={args.out}")
    elif args.command == "export":
        count = commands.export(args.ckpt, args.out, args.experts, dtype, args.tokenizer, progress_bar)
        print(f"{args.out}: {count} tensors of {args.ckpt}")
    else:
        return 0 if commands.verify(args.hf, args.ckpt, dtype, progress_bar) else 1
    return 0


def progress_bar(items: Iterable, total: int) -> Iterator:
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "tensors", total=total, console=Console(stderr=True))


if __name__ == "__main__":
    run_cli(main)
