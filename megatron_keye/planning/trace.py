"""A training step of one rank, run without content: what it holds, computes and sends.

The trainer's own Engine is built in a fake process group, and its step is run on ghosts (ghost.py). So activations, the
buffers of the experts' exchange, logits, gathers and recomputation are those of the code and not of formulas about it.
What is traced is small: one or two layers, one or two micro-batches. Layers are alike, and so are micro-batches: what one
more of them adds is the difference of two traces (survey.py).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from keye_data.sample import Batch
from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError
from megatron_keye.parallel import plan
from megatron_keye.planning.ghost import Ghosts
from megatron_keye.planning.ledger import Ledger, Phase
from megatron_keye.planning.operators import stand_ins
from megatron_keye.planning.stages import on_a_gpu
from megatron_keye.training import engine
from megatron_keye.training.engine import Engine

# Module class -> the part of a picture of memory; the innermost one counts.
PLACES = {
    "KeyeSelfAttention": "attention", "Indexer": "indexer", "SparseCoreAttention": "attention operator",
    "MoELayer": "experts", "VisionTower": "vision", "VisionEncoder": "vision",
    "Projector": "vision", "TransformerLayer": "residuals", "LanguageModel": "embedding and logits",
}  # fmt: skip

Phases = dict[str, Phase]


class TracedStep:
    """An Engine on ghosts. `held`: bytes by place of the last micro-batch between its forward and its backward."""

    def __init__(self, engine: Engine, ledger: Ledger):
        self.engine, self.ledger = engine, ledger
        self.held: Counter[str] = Counter()
        self._mark_phases()
        ledger.count_from_here()

    def language(self, batches: list[Batch]) -> Phases:
        """A whole step but for the optimizer's update -> phases "encode", "language", "reduce", "vision backward"."""
        self.ledger.begin_step()
        for batch in batches:
            for tensor in (
                batch.input_ids,
                batch.targets,
                batch.position_ids,
                batch.key_start,
                batch.key_stop,
                batch.patches,
            ):
                self.ledger.hold(tensor)
        self.engine.step(batches)
        return self.ledger.phases

    def vision(self, batches: list[Batch]) -> Phases:
        """Encoding and its backward alone."""
        self.ledger.begin_step()
        for batch in batches:
            self.ledger.hold(batch.patches)
        vision = self.engine.step.vision
        for leaf in vision.encode(batches):
            if leaf.requires_grad:
                leaf.grad = torch.zeros_like(leaf)
        vision.backward()
        return self.ledger.phases

    def _mark_phases(self) -> None:
        step: Any = self.engine.step
        step.vision.encode = self._marked("encode", step.vision.encode)
        step.vision.backward = self._marked("vision backward", step.vision.backward)
        step._language = self._marked("language", step._language)
        step.config.finalize_model_grads_func = self._marked("reduce", step.config.finalize_model_grads_func)
        step._update = lambda lm_loss: (True, 1.0)
        forward = step._forward_step

        def forward_step(*args: Any, **kwargs: Any) -> Any:
            before = Counter(self.ledger.by_place)
            result = forward(*args, **kwargs)
            self.held = Counter(self.ledger.by_place)
            self.held.subtract(before)
            return result

        step._forward_step = forward_step

    def _marked(self, name: str, function: Callable) -> Callable:
        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.ledger.within(name):
                return function(*args, **kwargs)

        return marked


@contextmanager
def traced(recipe: Recipe, stage: int = 0) -> Iterator[TracedStep]:
    """The step of the first rank of pipeline `stage`, in the smallest world the layout fits into.

    Raises UserError where process groups exist already or Megatron-Core refuses the layout.
    """
    if dist.is_initialized():
        raise UserError("a dry run needs a process of its own: this one already has process groups; start a fresh one")
    recipe = on_a_gpu(recipe)
    p = recipe.parallel
    world = p.pipeline * lcm(p.tensor * p.context, p.expert * p.expert_tensor)
    ledger = Ledger()
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()  # global, and sized for the layers of the model that ran
    tracker.clear()
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=stage * (world // p.pipeline), world_size=world)
        groups = plan.initialize(p)
        with ExitStack() as stack:
            for context in (_as_on_a_device(), _places(ledger), stand_ins(ledger, backend_of(recipe)), Ghosts(ledger)):
                stack.enter_context(context)
            yield TracedStep(Engine(recipe, groups, resume_from=Path("no weights are drawn")), ledger)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(
            f"recipe {recipe.name}: pipeline stage {stage} of this layout cannot be built or run ({reason}); "
            "change the parallel or model section, or see --debug"
        ) from error
    finally:
        tracker.clear()
        plan.shut_down()
        gc.collect()  # models and optimizers hold one another


def backend_of(recipe: Recipe) -> str:
    """The attention kernels that are planned for: those of a GPU, unless the recipe names others."""
    return recipe.model.attention_backend or "triton"


@contextmanager
def _as_on_a_device() -> Iterator[None]:
    """Where Megatron asks what a ghost is, it is a tensor of the GPU; objects are gathered by repeating one's own."""
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = tensor_type(self, *args, **kwargs)
        return name.replace("torch.meta.", "torch.cuda.") if isinstance(name, str) else name

    def all_gather_object(objects: list, mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    def one_by_one(operations: list) -> list:
        return [o.op(o.tensor, o.peer, group=o.group, tag=o.tag) for o in operations]

    state = torch.get_rng_state()
    with (
        mock.patch.object(torch.Tensor, "type", type_),
        mock.patch.object(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None),  # a ghost afterwards
        mock.patch.object(engine, "check_machine", lambda *_: None),  # this machine is not the one planned for
        mock.patch.object(dist, "all_gather_object", all_gather_object),
        mock.patch.object(dist, "batch_isend_irecv", one_by_one),
        mock.patch.object(megatron_random, "_get_cuda_rng_state", lambda *_, **__: state),
        mock.patch.object(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
        mock.patch.object(torch, "get_rng_state", lambda: state),
        mock.patch.object(torch, "set_rng_state", lambda _: None),
    ):
        yield


@contextmanager
def _places(ledger: Ledger) -> Iterator[None]:
    """Tells the ledger which part of the model runs."""
    outer: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        outer.append(ledger.place)
        if ledger.place != "vision":  # whose layers are of the same classes
            ledger.place = PLACES.get(type(module).__name__, ledger.place)

    def leave(module: nn.Module, *_: Any) -> None:
        ledger.place = outer.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def small(recipe: Recipe, stages: int, layers: int, vision_layers: int) -> Recipe:
    """The recipe with `layers` in each of `stages` stages, and as many vision layers."""
    return replace(
        recipe,
        model=replace(recipe.model, num_layers=stages * layers, vision_layers=vision_layers),
        parallel=replace(recipe.parallel, pipeline=stages, virtual_pipeline=None),
        optimizer=replace(recipe.optimizer, offload_fraction=0.0),
    )
