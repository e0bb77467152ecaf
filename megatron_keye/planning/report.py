"""A plan on the terminal, as tables, and what they do not contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_keye.errors import UserError

GIB = 2**30


def print_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """`plan` as planning/dry_run.py makes it, on stdout. A pipe or a file gets lines of 110 columns."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=110)
    tables = [_essentials(plan), _parameters(plan), _stages(plan), _flops(plan)]
    if "step" in plan:
        tables += [_activations(plan), _step(plan), _traffic(plan)]
    for table in tables:
        console.print(table)
    console.print(f"FLOPs: {plan['flops']['convention']}.", markup=False)
    console.print("Not estimated:", *(f"  - {what}" for what in plan["not_estimated"]), sep="\n", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _essentials(plan: dict[str, Any]) -> Table:
    recipe, layout = plan["recipe"], plan["layout"]
    table = Table(title=f"Recipe {recipe['name']}", title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    attention = recipe["attention_mode"] + (f", top {recipe['topk']:,}" if recipe["topk"] else "")
    chunks = f", {layout['virtual_pipeline']} interleaved chunks a stage" if layout["virtual_pipeline"] else ""
    for name, value in (
        ("model", f"{recipe['preset']}, attention {attention}"),
        ("trains", f"{recipe['scope']}, {recipe['precision']}, recompute {recipe['recompute']}"),
        ("starts from", recipe["init_from"] or "random weights"),
        ("context", f"{recipe['seq_length']:,} tokens a row"),
        (
            "batch",
            f"{recipe['global_batch_size']:,} rows = {recipe['tokens_per_step']:,} tokens a step, in "
            f"{recipe['micro_batches_per_step']:,} micro-batches of {recipe['micro_batch_size']} on each data rank",
        ),
        ("steps", f"{recipe['steps']:,}"),
        (
            "layout",
            f"{layout['world_size']:,} ranks = {layout['pipeline']} pipeline x {layout['data']:,} data x "
            f"{layout['context']} context x {layout['tensor']} tensor{chunks}",
        ),
        (
            "experts",
            f"{layout['pipeline']} pipeline x {layout['expert_data']:,} expert-data x {layout['expert']} expert x "
            f"{layout['expert_tensor']} expert-tensor",
        ),
    ):
        table.add_row(name, value)
    return table


def _parameters(plan: dict[str, Any]) -> Table:
    counts = plan["parameters"]
    table = _table("Parameters of the whole model", "part", "all", "trained")
    for part, count in counts["by_part"].items():
        table.add_row(part, f"{count:,}", f"{counts['trained'][part]:,}")
    table.add_section()
    table.add_row("total", f"{counts['total']:,}", f"{sum(counts['trained'].values()):,}")
    table.add_row("active per text token", f"{counts['active_per_token']:,}", "")
    return table


def _stages(plan: dict[str, Any]) -> Table:
    """One column a kind of size, one row a stage: a pipeline may have many stages."""
    kinds = ["weights", "gradients", "optimizer", *(["activations"] if "step" in plan else []), "sum"]
    table = _table(
        "One rank of each pipeline stage (GiB; the vision tower is whole on every rank)",
        *("stage: layers", "rank", "parameters", "trained", *("all" if kind == "sum" else kind for kind in kinds)),
    )
    for stage in plan["stages"]:
        layers = ", ".join(f"{first}-{last}" for first, last in stage["layers"])
        table.add_row(
            f"{stage['stage']}: {layers}",
            f"{stage['rank']:,}",
            _millions(sum(stage["parameters"].values())),
            _millions(sum(stage["trained"].values())),
            *(f"{stage['bytes'][kind] / GIB:.2f}" for kind in kinds),
        )
        for part, count in stage["parameters"].items():
            table.add_row(f"   {part}", "", _millions(count), _millions(stage["trained"][part]), style="dim")
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _activations(plan: dict[str, Any]) -> Table:
    """The greatest peaks; stages alike but for the micro-batches in flight stand in one table."""
    pictures = plan["step"]["picture_tokens_per_row"]
    table = _table(
        f"Activations at their peak (GiB; {pictures:,} tokens of each row are pictures)",
        *("stage", "peak during", "in flight", "part", "GiB"),
    )
    for stage in plan["stages"]:
        head = [str(stage["stage"]), stage["peak_in"], str(stage["micro_batches_in_flight"])]
        for part, size in stage["activations"].items():
            if size >= 0.01 * stage["bytes"]["activations"]:
                table.add_row(*head, part, f"{size / GIB:.2f}")
                head = ["", "", ""]
    return table


def _step(plan: dict[str, Any]) -> Table:
    step = plan["step"]
    table = _table(f"A step on {step['machine']}, predicted", "", "seconds", "share")
    total = step["seconds"]["total"]
    for name, seconds in step["seconds"].items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:.0%}")
    table.add_section()
    for name, value in (
        ("tokens/s/GPU", f"{step['tokens_per_second_and_gpu']:,.0f}"),
        ("TFLOP/s/GPU, useful", f"{step['tflops_per_gpu']:.0f}"),
        ("of the peak (MFU)", f"{step['mfu']:.1%}"),
        ("pipeline bubble", f"{step['bubble']:.1%}"),
        ("FLOPs issued by the slowest rank", f"{step['issued_flops_per_rank']:.3e}"),
    ):
        table.add_row(name, value, "")
    return table


def _traffic(plan: dict[str, Any]) -> Table:
    table = _table("Sent by one rank in a step (GiB)", "collective", "calls", "over NVLink", "over the network")
    for name, row in plan["step"]["traffic"].items():
        table.add_row(name, f"{row['count']:,.0f}", f"{row['nvlink'] / GIB:.2f}", f"{row['network'] / GIB:.2f}")
    return table


def _flops(plan: dict[str, Any]) -> Table:
    flops = plan["flops"]
    table = _table("FLOPs, forward and backward, full rows of text", "", "as if dense", "actual")
    for name, key in (("a step", "per_step"), ("a step, per rank", "per_step_and_rank")):
        table.add_row(name, f"{flops[key]['dense_equivalent']:.4e}", f"{flops[key]['actual']:.4e}")
    frame = flops["largest_frame"]
    table.add_row(f"each frame of {frame['tokens']} tokens, on top", "", f"{frame['flops']:.4e}")
    return table


def write_json(result: dict[str, Any], path: Path) -> None:
    """The same for programs; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written ({error.strerror}); give a path in a writable folder"
        ) from error
