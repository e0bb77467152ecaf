"""Health of the sparse attention in the log: every so many steps, on a few queries of each micro-batch, in every layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.metrics import read_rows
from megatron_keye.model.attention import SparseCoreAttention
from megatron_keye.model.health import PER_GROUP, PER_QUERY
from megatron_keye.parallel.together import together

NAMES = {name: f"dsa/{'recall-' if name in (*PER_GROUP, 'chance') else ''}{name}" for name in PER_QUERY}
QUERIES = "dsa/probe-queries"
RECALL = NAMES["mass"]


def check_gate(checkpoint: Path, least: float) -> None:
    """Raises UserError on every rank unless the run that wrote `checkpoint` logged a recall of `least` or more by then."""
    together(lambda: _check_gate(checkpoint, least) if dist.get_rank() == 0 else None)


def _check_gate(checkpoint: Path, least: float) -> None:
    log, step = checkpoint.parent.parent / "metrics.jsonl", int(checkpoint.name.rpartition("_")[2])
    rows = read_rows(log) if log.is_file() else []
    found = [row for row in rows if row["iteration"] <= step and row.get(RECALL) is not None]
    if not found:
        raise UserError(
            f"training.recall_gate = {least}, but {log} holds no {RECALL} up to step {step}: logging.dsa_health_interval was null, or no "
            "query saw more than model.topk keys; see to that in the warm-up, or set training.recall_gate=null here"
        )
    recall, layers = found[-1][RECALL], found[-1][f"{RECALL}-by-layer"]
    if recall < least:
        worst = min(range(len(layers)), key=layers.__getitem__)
        raise UserError(
            f"training.recall_gate = {least}: at step {found[-1]['iteration']} the indexers of {checkpoint} find {recall:.3f} of dense "
            f"attention (layer {worst + 1}: {layers[worst]:.3f}); warm up longer by raising its training.steps, or lower the gate"
        )


class Health:
    """`models`: this rank's stages. Measures where there are indexers that run: not in dense attention."""

    def __init__(self, recipe: Recipe, models: Iterable[nn.Module]):
        self.model, self.last = recipe.model, recipe.training.steps
        self.interval = recipe.logging.dsa_health_interval if recipe.model.attention_mode != "dense" else None
        self.layers = [m for model in models for m in model.modules() if isinstance(m, SparseCoreAttention)]
        self.due = False

    def before(self, step: int) -> None:
        """Step number `step` is about to be taken. The last one is always measured: the next phase asks for it."""
        self.due = self.interval is not None and (step % self.interval == 0 or step == self.last)
        for layer in self.layers:
            layer.probing = self.due

    def after(self) -> dict[str, Any]:
        """What the step showed, the same on every rank; empty where it was not measured. Collective when it was."""
        if not self.due:
            return {}
        width = 1 + len(PER_QUERY) + len(PER_GROUP) * self.model.num_query_groups
        table = torch.zeros(self.model.num_layers, width, dtype=torch.float64, device=torch.cuda.current_device())
        for layer in self.layers:
            layer.probing = False
            if layer.health is not None:
                table[layer.layer_number - 1] = layer.health
                layer.health = None
        dist.all_reduce(table, group=ps.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(table, group=ps.get_pipeline_model_parallel_group())
        return metrics_of(table)


def metrics_of(table: Tensor) -> dict[str, Any]:
    """Sums of `measure`, [layers, 1 + 8 + 2 * groups] -> means over layers, and lists of each layer and KV group."""
    queries = int(table[0, 0])
    metrics: dict[str, Any] = {QUERIES: queries}
    if not queries:
        return metrics  # no query of the probe saw more than topk keys
    means = table[:, 1:] / queries
    for name, column in zip(PER_QUERY, means.T):
        metrics[NAMES[name]] = float(column.mean())
    for name, column in zip(PER_QUERY, means.T):
        metrics[f"{NAMES[name]}-by-layer"] = column.tolist()
    groups = means[:, len(PER_QUERY) :].unflatten(1, (len(PER_GROUP), -1))
    for i, name in enumerate(PER_GROUP):
        metrics[f"{NAMES[name]}-by-layer-and-group"] = groups[:, i].tolist()
    return metrics
