"""Pictures of the sparse attention: recall by layer over the steps of a run, and which frames of a clip queries select."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_kernels import dsa
from megatron_keye.errors import UserError
from megatron_keye.metrics import read_rows

RECALL = "dsa/recall-mass"


def draw_recall(run_dir: Path, out: Path) -> None:
    """Mean recall and what chance would find, above; each layer's, below. Raises UserError for a run that measured none."""
    log = run_dir / "metrics.jsonl"
    rows = [row for row in read_rows(log) if row.get(RECALL) is not None] if log.is_file() else []
    if not rows:
        raise UserError(
            f"{log} holds no {RECALL}; it is measured every logging.dsa_health_interval steps, where there is something to choose"
        )
    steps = [row["iteration"] for row in rows]
    figure = _figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=False, height_ratios=[1, 2])
    above.plot(steps, [row[RECALL] for row in rows], marker="o", markersize=3, label="mass")
    above.plot(steps, [row["dsa/recall-set"] for row in rows], marker="o", markersize=3, label="set")
    above.plot(steps, [row["dsa/recall-chance"] for row in rows], linestyle=":", color="grey", label="chance")
    above.set(ylabel="top-k recall, mean", ylim=(0, 1.02), xlabel="step")
    above.legend(fontsize=8, loc="lower right")
    by_layer = torch.tensor([row[f"{RECALL}-by-layer"] for row in rows]).T  # [layers, measurements]
    _heat(figure, below, by_layer, "layer", "mass of dense attention found")
    _ticks(below.xaxis, [str(step) for step in steps])
    below.set_xlabel("step")
    _save(figure, out)


def draw_frames(model: Any, inputs: dict[str, Tensor], out: Path, title: str = "") -> None:
    """`model` a KeyeModel in sparse mode, `inputs` of Processor.prompt with one clip: what the tokens behind it select."""
    cfg = model.cfg
    if cfg.attention_mode != "sparse":
        raise UserError(f"attention_mode = {cfg.attention_mode!r} selects nothing; load the model with 'sparse'")
    frame_of = frames(inputs["input_ids"][0], cfg.video_token_id)
    if not bool((frame_of >= 0).any()):
        raise UserError("the prompt holds no clip")
    behind = int(torch.nonzero(frame_of >= 0)[-1]) + 1
    shares = frame_shares(selections(model, inputs, behind), frame_of)  # [layers, queries, frames]
    figure = _figure(9, 7)
    above, below = figure.subplots(2, 1)
    _heat(figure, above, shares.mean(0), "token behind the clip", "share of the frame selected, mean over layers")
    _heat(figure, below, shares.mean(1), "layer", "share of the frame selected, mean over tokens")
    for axes in (above, below):
        _ticks(axes.xaxis, [str(frame) for frame in range(shares.shape[2])])
        axes.set_xlabel("frame")
    figure.suptitle(title or f"{shares.shape[2]} frames, top-k {cfg.topk} of {len(frame_of)} tokens", fontsize=9)
    _save(figure, out)


def frames(ids: Tensor, video_token_id: int) -> Tensor:
    """int64 [T] token ids -> the frame that each token is of, counted from 0; -1 for any other token."""
    visual = ids == video_token_id
    begins = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
    return torch.where(visual, begins.cumsum(0) - 1, -1)


@torch.no_grad()
def selections(model: Any, inputs: dict[str, Tensor], first: int) -> Tensor:
    """bool [layers, T - first, T]: which tokens each token from `first` on selects, in every layer."""
    from megatron_keye.model.attention import SparseCoreAttention

    cfg, found = model.cfg, []

    def look(module: Any, args: tuple[Tensor, ...]) -> None:
        iq, ik, iw = (x[:, 0] for x in args[4:])  # of the only row
        stop = torch.arange(first + 1, len(iq) + 1, dtype=torch.int32, device=iq.device)
        indices = dsa.select_topk(
            iq[first:], ik, iw[first:], torch.zeros_like(stop), stop, cfg.topk,
            cfg.attention_backend, fake_fp8=cfg.indexer_fake_fp8,
        )  # fmt: skip
        found.append(dsa.reference.index_mask(indices, len(ik)).cpu())

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, SparseCoreAttention)]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def frame_shares(selected: Tensor, frame_of: Tensor) -> Tensor:
    """bool [.., Q, T], int64 [T] -> [.., Q, frames]: the part of each frame's tokens that is selected."""
    count = int(frame_of.max()) + 1
    member = torch.nn.functional.one_hot(frame_of.clamp(min=0), count) * (frame_of >= 0)[:, None]
    return selected.float() @ (member / member.sum(0)).float()


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat(figure: Any, axes: Any, values: Tensor, rows: str, label: str) -> None:
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=1, origin="lower")
    _ticks(axes.yaxis, [str(row) for row in range(1, len(values) + 1)])
    axes.set_ylabel(rows)
    figure.colorbar(image, ax=axes, label=label)


def _ticks(axis: Any, names: list[str]) -> None:
    """Ten at most, so that they can be read."""
    every = -(-len(names) // 10)
    axis.set_ticks(range(0, len(names), every), names[::every])


def _save(figure: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error}); give a .png or .svg in a writable folder") from error
