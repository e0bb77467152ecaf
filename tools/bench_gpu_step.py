"""Train a full-width slice of the 30B model on one GPU: tokens/s, TFLOP/s, MFU and peak memory, beside plan and publications.

    python tools/bench_gpu_step.py [--layers 4] [--experts 128] [--lengths 4096 32768 131072] [--json FILE]
    python tools/bench_gpu_step.py --mini      # the same path at mini size, on a CPU too: shapes, not speed

Needs torch, triton and Megatron-Core alone. A few decoder layers with embedding and head, at full width, with all experts
(or the share that one GPU of an expert-parallel group would hold), bf16 with fp32 masters, AdamW, rows of one document,
text alone. Only the last `--predicted` tokens carry loss, as in long-context fine-tuning: logits of 128K tokens would
not fit beside the rest. Work is counted as in the trainer's log: a multiply-add is two, backward twice the forward,
recomputation not counted. Each case has a process of its own; the plan is made without the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))

import torch
from torch import nn

from megatron_keye.config.model import PRESETS, ModelConfig
from megatron_keye.config.recipe import Recipe

GIB = 2**30
MINI_LENGTHS, FULL_LENGTHS = [64, 128], [4096, 32_768, 131_072]
PUBLISHED = """Published, full model, H100, bf16 (the projects' own claims):
  Megatron-Bridge, 16 GPUs, 4K, routing forced even      13,011 tokens/s/GPU  299 TFLOP/s/GPU
  Megatron-Bridge, 16 GPUs, 4K, natural routing           8,655               199
  Megatron-Bridge, 16 GPUs, 4K, plain all-to-all              -               133
  Megatron-Bridge, 16 GPUs, 32K, dense, full recompute      459                26
  GLM-5.2 744B-A40B with DSA, 608 GPUs, 200K                117                40"""


def recipe_of(case: argparse.Namespace) -> Recipe:
    recipe = Recipe(name=f"slice of {case.layers} layers")
    shape: dict[str, Any] = dict(num_layers=case.layers, attention_mode=case.mode, grouped_experts=True)
    if case.mini:
        shape = PRESETS["keye_mini"] | shape | dict(vocab_size=256, image_token_id=254, video_token_id=255, topk=16)
    else:
        shape |= dict(num_experts=case.experts, vision_layers=1)  # no picture is there; a tower has to be
    recipe.model = ModelConfig(**shape)
    training, optimizer = recipe.training, recipe.optimizer
    training.precision = "bf16"
    training.scope = "all_but_indexers" if case.mode == "dense" else "all"
    training.recompute = "full" if case.length > 4096 else "none"
    training.global_batch_size = 1
    recipe.data.seq_length = case.length
    optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, optimizer.schedule = 1e-4, 0.0, 0, "constant"
    return recipe


def batch_of(recipe: Recipe, predicted: int, device: torch.device) -> Any:
    """One row that is one document of random tokens."""
    from keye_data.sample import IGNORE
    from megatron_keye.planning.dry_run import full_row
    from megatron_keye.training.feed import to_device

    length = recipe.data.seq_length
    row = full_row(length)
    ids = torch.randint(0, recipe.model.image_token_id, (1, length), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    targets[:, : max(length - predicted, 0)] = IGNORE
    positions = torch.arange(length).expand(3, 1, length).contiguous()
    return to_device(replace(row, input_ids=ids, targets=targets, position_ids=positions), device)


# ---- one case


@torch.no_grad()
def draw(modules: Iterable[nn.Module], cfg: ModelConfig, _: int) -> None:
    """Random weights, made where they stand: the trainer's own would take minutes, and only time is measured here."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, cfg.init_std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def measure(case: argparse.Namespace) -> dict[str, Any]:
    """Steps of the slice on this machine -> seconds of one, peak bytes, work, losses."""
    from megatron_keye.parallel import plan
    from megatron_keye.planning.flops import step_flops
    from megatron_keye.training import engine

    recipe = recipe_of(case)
    groups = plan.initialize(recipe.parallel)
    device = torch.device(torch.cuda.current_device())
    # check_machine also asks for what checkpoints need, and none is written here
    with mock.patch.object(engine, "initialize_weights", draw), mock.patch.object(engine, "check_machine"):
        trained = engine.Engine(recipe, groups)
    batches = [batch_of(recipe, case.predicted, device)]
    losses = [trained.step(batches).lm_loss for _ in range(2)]  # kernels are compiled, optimizer states made
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    losses += [trained.step(batches).lm_loss for _ in range(case.steps)]
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / case.steps
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    work = step_flops(recipe.model, batches)
    return {"seconds": seconds, "peak": peak, "flops": work, "losses": losses, "experts": _experts(trained)}


def _experts(trained: Any) -> str:
    return type(trained.language[0].decoder.layers[0].mlp.experts).__name__


# ---- the plan of it


def predict(case: argparse.Namespace) -> dict[str, Any]:
    """What the planner says of the same steps -> seconds, peak bytes; and the share of work that it counted."""
    from megatron_keye.planning.dry_run import make_plan
    from megatron_keye.planning.hardware import compute_seconds, machine
    from megatron_keye.planning.trace import traced

    recipe, hardware = recipe_of(case), machine(case.machine)
    batch = batch_of(recipe, case.predicted, torch.device("cpu"))
    with traced(recipe) as step:
        phases = step.language([replace(batch, patches=torch.empty(0, 3, 14, 14, dtype=torch.uint8, device="meta"))])
    held = make_plan(recipe, 1)["stages"][0]["bytes"]["sum"]
    work: Counter = sum((phase.work for phase in phases.values()), Counter())
    update = 32 * sum(make_plan(recipe, 1)["parameters"]["trained"].values()) / hardware.copy
    activations = max(phase.peak for phase in phases.values())
    return {"seconds": compute_seconds(hardware, work) + update, "peak": held + activations}


def chosen(case: argparse.Namespace, memory: int | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The case with as many layers as the plan finds room for, and its plan."""
    while True:
        plan = child(case, "--predict", CUDA_VISIBLE_DEVICES="")
        if memory is None or case.layers == 1 or plan.get("peak", 0) < 0.92 * memory:
            return case, plan
        case = argparse.Namespace(**{**vars(case), "layers": case.layers - 1})


# ---- all cases


def child(case: argparse.Namespace, what: str, **environment: str) -> dict[str, Any]:
    """What a process of its own says of a case; {"failed": reason} where it ends with an error."""
    words = [
        f"--{key}={value}" for key, value in vars(case).items() if key not in ("mini", "length", "mode", "lengths")
    ]
    words += [f"--lengths={case.length}", f"--modes={case.mode}", what, *(["--mini"] if case.mini else [])]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {
        "failed": "out of memory" if "OutOfMemoryError" in done.stderr else (lines or ["no reason given"])[-1][:300]
    }


def row_of(case: argparse.Namespace, found: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    row = {"length": case.length, "mode": case.mode, "layers": case.layers, "measured": found, "planned": plan}
    if "failed" not in found:
        from megatron_keye.planning.flops import step_flops

        whole = replace(recipe_of(case), model=replace(recipe_of(case).model, num_layers=ModelConfig.num_layers))
        rate = found["flops"] / found["seconds"]
        full = step_flops(whole.model, [batch_of(whole, case.predicted, torch.device("cpu"))])
        row |= {"tflops": rate / 1e12, "tokens_per_second": case.length / found["seconds"]}
        row |= {"mfu": rate / 989e12, "tokens_per_second_of_48_layers": case.length * rate / full}
    return row


def line_of(row: dict[str, Any]) -> str:
    found, plan = row["measured"], row["planned"]
    head = f"{row['length']:>7} {row['mode']:<6} {row['layers']:>6}"
    planned = f"{_gib(plan.get('peak')):>8} {_ms(plan.get('seconds')):>9}" if "failed" not in plan else plan["failed"]
    if "failed" in found:
        return f"{head}  {found['failed']}; planned: {planned}"
    return (
        f"{head} {row['tokens_per_second']:>10,.0f} {row['tflops']:>8.1f} {row['mfu']:>6.1%} {_gib(found['peak']):>9} "
        f"{_ms(found['seconds']):>9} {planned} {row['tokens_per_second_of_48_layers']:>12,.0f}"
    )


HEAD = (
    " length mode   layers   tokens/s  TFLOP/s    MFU  peak GiB   ms/step  planned   ms/step  tokens/s of 48 layers\n"
    "                                                                      peak GiB"
)


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="at most; fewer where the plan finds no room (default 4; mini 2)")
    parser.add_argument("--experts", type=int, default=128, help="16: the share of one GPU of eight")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--modes", nargs="+", choices=("dense", "sparse"), default=["dense", "sparse"])
    parser.add_argument("--predicted", type=int, default=4096, help="tokens of a row that carry loss")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--machine", default="h200", help="whose rates the plan takes: h100 or h200")
    parser.add_argument("--json", type=Path, help="write every row there as well")
    parser.add_argument("--mini", action="store_true", help="mini size, on a CPU where there is no GPU")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.layers = args.layers or (2 if args.mini else 4)
    args.lengths = args.lengths or (MINI_LENGTHS if args.mini else FULL_LENGTHS)
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    fixed = ("layers", "experts", "predicted", "steps", "machine", "mini")
    cases = [
        argparse.Namespace(length=length, mode=mode, **{key: getattr(args, key) for key in fixed})
        for length in args.lengths
        for mode in args.modes
    ]
    if args.measure or args.predict:
        print(json.dumps((measure if args.measure else predict)(cases[0])))
        return 0
    if not torch.cuda.is_available() and not args.mini:
        print("no CUDA device: nothing to measure; --mini runs the same path at mini size on a CPU", file=sys.stderr)
        return 2
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a CPU: shapes alone, its times mean nothing"
    print(f"{name}; torch {torch.__version__}; {args.experts} experts; MFU of 989 TFLOP/s; plan for {args.machine}")
    print(HEAD, flush=True)
    rows = []
    for wanted in cases:
        case, plan = chosen(wanted, memory)
        rows.append(row_of(case, child(case, "--measure"), plan))
        print(line_of(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not args.mini:
        print(PUBLISHED)
    return 1 if any("failed" in row["measured"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
