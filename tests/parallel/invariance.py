"""Ten training steps of the mini model in any layout, and how far two such runs are apart.

Every run starts from the same weights and sees the same rows: packed documents of text, pictures and clips, with padding
at the end of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from weights import whole_weights

from megatron_keye.config.model import build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.recipe import Recipe
from megatron_keye.parallel import plan
from megatron_keye.parallel.plan import Plan
from megatron_keye.training.engine import Engine
from tests.parallel.launch import launch
from tests.parallel.rows import step_batches

STEPS, ROWS, SEQ_LENGTH = 10, 4, 64
SCOPES = {"dense": "all_but_indexers", "warmup": "indexers", "sparse": "all"}  # attention mode: what learns

LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-3


@dataclass
class Run:
    log: list[dict[str, float]]  # one entry a step
    before: dict[str, Tensor]  # weights by released name
    after: dict[str, Tensor]


def recipe_for(mode: str, layout: dict[str, Any], **settings: Any) -> Recipe:
    """`settings`: dotted keys of the recipe, with __ for the dot."""
    recipe = Recipe()
    recipe.model = build_config(
        "keye_mini", attention_mode=mode, vocab_size=256, image_token_id=254, video_token_id=255, topk=16
    )
    recipe.parallel = ParallelConfig(**layout)
    recipe.training.precision = "fp32"
    recipe.training.scope = SCOPES[mode]
    recipe.training.vision_chunk_patches = 40  # several chunks a step
    # A gradient of nothing but rounding would move a weight by a whole step, were epsilon far below it.
    recipe.optimizer.lr, recipe.optimizer.eps = 1e-3, 1e-5
    for key, value in settings.items():
        section, name = key.split("__")
        assert hasattr(getattr(recipe, section), name), key
        setattr(getattr(recipe, section), name, value)
    return recipe


def some_rows(recipe: Recipe, groups: Plan, step: int, micro_batch: int | None = None, **kind: Any) -> list:
    """Two micro-batches a rank, as far as its rows go, unless `micro_batch` says otherwise."""
    size = micro_batch or max(1, ROWS // groups.data_size // 2)
    return step_batches(recipe.model, groups, step, rows=ROWS, seq_length=SEQ_LENGTH, micro_batch=size, clips=1, **kind)


def train(recipe: Recipe, batches: Callable[..., list] = some_rows, steps: int = STEPS, **kind: Any) -> Run:
    """On every rank of a world; the weights are on rank 0. Those from before only of a world of one: all start alike."""
    groups = plan.initialize(recipe.parallel)
    engine = Engine(recipe, groups)
    before = whole_weights(engine) if groups.world_size == 1 else {}
    log = []
    for step in range(steps):
        result = engine.step(batches(recipe, groups, step, **kind))
        engine.schedule.step(increment=1)
        log.append({"lm": result.lm_loss, "norm": result.grad_norm, **result.extra})
    return Run(log, before, whole_weights(engine))


def run(world_size: int, recipe: Recipe, *args: Any, **kind: Any) -> Run:
    """`train` on `world_size` ranks, which must agree on what they log."""
    first, *others = launch(lambda: train(recipe, *args, **kind), world_size, timeout=300)
    assert all(other.log == first.log for other in others), "ranks disagree on what they log"
    return first


def deviation(expected: Run, got: Run) -> dict[str, float]:
    """The worst relative differences: of losses, of gradient norms, of weights against how far they have moved."""
    assert len(expected.log) == len(got.log) and expected.after.keys() == got.after.keys()
    worst = {"loss": 0.0, "norm": 0.0, "weight": 0.0}
    for a, b in zip(expected.log, got.log):
        assert a.keys() == b.keys()
        for key in a:
            kind = "norm" if key == "norm" else "loss"
            worst[kind] = max(worst[kind], abs(a[key] - b[key]) / abs(a[key]))
    for name, weight in expected.after.items():
        moved, apart = (weight - expected.before[name]).norm().item(), (weight - got.after[name]).norm().item()
        assert moved > 0 or apart == 0, f"{name} is frozen, and moved"
        worst["weight"] = max(worst["weight"], apart / moved if moved else 0.0)
    return worst


def assert_same(expected: Run, got: Run) -> None:
    worst = deviation(expected, got)
    assert worst["loss"] < LOSS and worst["norm"] < NORM and worst["weight"] < WEIGHT, worst
