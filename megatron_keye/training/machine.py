"""What a recipe asks of the machine it runs on: checked before anything is built. What is wrong anywhere is in config/."""

from __future__ import annotations

import importlib.util

import torch

from keye_kernels import dsa
from megatron_keye.config.recipe import Recipe
from megatron_keye.errors import UserError


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raises UserError naming the key that this machine cannot serve, and what it can."""
    backend = recipe.model.attention_backend
    try:
        dsa.backends.resolve(backend, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model.attention_backend = {backend}: {error}") from error
    if recipe.parallel.dispatcher == "flex" and not (device.type == "cuda" and _installed("deep_ep")):
        raise UserError("parallel.dispatcher = flex needs CUDA and DeepEP (package deep_ep); use 'alltoall'")
    if recipe.optimizer.offload_fraction and device.type != "cuda":
        raise UserError(
            f"optimizer.offload_fraction = {recipe.optimizer.offload_fraction} moves optimizer states from a GPU to the CPU, "
            "and there is no GPU; set 0"
        )
    if not _installed("psutil"):  # the writer's child would fail, and its parent wait for it for ever
        raise UserError("checkpoints cannot be written without the package psutil; install it")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
