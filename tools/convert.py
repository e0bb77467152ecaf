"""Between Hugging Face folders and this stack's checkpoints, bit for bit:

python tools/convert.py import --hf DIR --out CKPT                        # weights for training.init_from=CKPT
python tools/convert.py export --ckpt CKPT --out DIR [--experts fused|separate] [--dtype bf16|fp32] [--tokenizer PATH]
python tools/convert.py verify --hf DIR --ckpt CKPT [--dtype bf16|fp32]   # exit code 1 where anything differs
python tools/convert.py names --preset keye_vl2_30b_a3b --tp 4 --ep 8 --pp 4

A new Keye out of plain Qwen3-30B-A3B, as its training started (model section and seed as the recipe says; without one,
as the folders say, and of the released sizes where they say nothing):

python tools/convert.py import --hf QWEN --vision-hf KEYE --indexers init --recipe recipes/stage0.yaml --out CKPT
    --projector init             a vision tower's folder whose projector is of another width, as Keye-VL-1.5-8B's
    --vision init                no vision tower's folder at all

CKPT is a run's folder or its checkpoints folder (the newest iteration), or an iter_* folder. An imported one is of no
layout: it loads under any number of tensor-, expert- and pipeline-parallel ranks. DIR may hold a layer's experts in two
tensors or one by one. import and export hold a few tensors in memory, not the model; one that was stopped goes on where
it stood when the same command is given again, and its --out appears only when it is whole. A checkpoint's .metadata is a
pickle, which runs code as it is read: give export and verify no CKPT of a stranger's.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
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
    command.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Keye, or plain Qwen3-MoE")
    command.add_argument("--out", type=Path, required=True, metavar="CKPT", help="a folder without checkpoints")
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="as stored, tensor by tensor, if left out")
    new = command.add_argument_group("a new Keye out of plain Qwen3-MoE (nothing is drawn that is not named here)")
    new.add_argument("--vision-hf", type=Path, metavar="DIR", help="vision tower and projector: visual.*, mlp_AR.*")
    new.add_argument("--indexers", choices=("init",), help="draw the indexers")
    new.add_argument("--projector", choices=("init",), help="draw the projector")
    new.add_argument("--vision", choices=("init",), help="draw the vision tower")
    new.add_argument("--seed", type=int, help="of what is drawn; the recipe's training.seed if left out")
    new.add_argument("--recipe", type=Path, help="whose model section it is; as the folders say if left out")
    new.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the recipe, as in training; profile=NAME too")

    command = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    command.add_argument("--ckpt", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--experts", **experts)
    command.add_argument("--dtype", **dtype)
    command.add_argument("--tokenizer", metavar="PATH", help="the run's own if left out")

    command = commands.add_parser(
        "verify",
        help="compare a Hugging Face folder with a checkpoint: config.json, and tensor by tensor",
    )
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
    from megatron_keye.conversion.progress import bar

    dtype = commands.DTYPES[args.dtype] if args.dtype else None
    if args.command == "import":
        folder = commands.import_hf(args.hf, args.out, dtype, new_model(args), bar)
        print(f"{folder}: weights of {args.hf}; start from them with training.init_from={args.out}")
    elif args.command == "export":
        count = commands.export(args.ckpt, args.out, args.experts, dtype, args.tokenizer, bar)
        print(f"{args.out}: {count} tensors of {args.ckpt}")
    else:
        return 0 if commands.verify(args.hf, args.ckpt, dtype, bar) else 1
    return 0


def new_model(args: argparse.Namespace) -> Any:
    """What --indexers and the options beside it say; None for a folder that is imported as it is."""
    from megatron_keye.config.load import load_recipe
    from megatron_keye.conversion.commands import Start
    from megatron_keye.errors import UserError

    new = (args.vision_hf, args.indexers, args.projector, args.vision, args.seed, args.recipe)
    if args.overrides and args.recipe is None:
        raise UserError(f"{args.overrides[0]}: overrides are of a recipe; give --recipe too")
    if all(value is None for value in new):
        return None
    recipe = None if args.recipe is None else load_recipe(args.recipe, args.overrides)
    seed = args.seed if args.seed is not None else recipe.training.seed if recipe else Start.seed
    return Start(
        vision_hf=args.vision_hf,
        draw_indexers=args.indexers is not None,
        draw_vision=args.vision is not None,
        draw_projector=args.projector is not None,
        model=recipe.model if recipe else None,
        seed=seed,
    )


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bytes are moved, nothing is computed
    gc.set_threshold(100_000)  # libraries make a million objects; a second goes by in searching them for cycles
    run_cli(main)
