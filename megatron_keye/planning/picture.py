"""A plan's memory as a picture: one bar for each pipeline stage, stacked by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_keye.errors import UserError

GIB = 2**30
KEPT = ("weights", "gradients", "optimizer")


def draw(plan: dict[str, Any], path: Path) -> None:
    """Writes `path` (.png, .svg or .pdf). Raises UserError where it cannot be, or where the format is none of these."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages, layout = plan["stages"], plan["layout"]
    parts = list(KEPT)
    for stage in stages:
        parts += [part for part in stage.get("activations", {}) if part not in parts]
    figure = Figure(figsize=(max(9.0, 1.2 * len(stages) + 5), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = [0.0] * len(stages)
    colours = [f"C{i}" for i in range(10)] + ["gold", "teal", "navy", "salmon", "black"]
    for part, colour in zip(parts, colours):
        sizes = [{**stage["bytes"], **stage.get("activations", {})}.get(part, 0) / GIB for stage in stages]
        axes.bar(range(len(stages)), sizes, bottom=height, width=0.6, label=part, color=colour)
        height = [below + size for below, size in zip(height, sizes)]
    for index, top in enumerate(height):
        axes.text(index, top, f"{top:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(stages)), [f"stage {stage['stage']}" for stage in stages])
    axes.set_xlim(-1, len(stages))
    axes.set_ylabel("GiB on one rank, at the peak")
    figure.suptitle(
        f"{plan['recipe']['name']}: {layout['world_size']:,} ranks = pipeline {layout['pipeline']} x data {layout['data']:,} "
        f"x context {layout['context']} x tensor {layout['tensor']}, experts over {layout['expert']}",
        fontsize=9,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--picture {path}: cannot be written ({error}); give a .png or .svg in a writable folder"
        ) from error
