"""Which implementations the layers are built from: Transformer Engine's where CUDA and it are there, Megatron's own otherwise.

Chosen in this one place, printed by the trainer. Norms stay apart from the linear layers in both, because the indexer
needs the normalised hidden states; so the checkpoint's keys are the same too.
The Transformer Engine side is unverified: no machine of ours has run it.
"""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from megatron_keye.model.norms import RMSNorm


class LocalBackend(LocalSpecProvider):
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm  # Megatron's torch norm refuses sequence parallelism


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def backend() -> BackendSpecProvider:
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalBackend()


def describe() -> str:
    """One line for the log."""
    if has_transformer_engine():
        return "Transformer Engine layers (unverified), its fused optimizer"
    optimizer = "Apex's fused Adam" if torch.cuda.is_available() and _has_apex() else "torch's AdamW"
    return f"Megatron-Core's local layers, own RMSNorm, {optimizer}"


def _has_apex() -> bool:
    try:
        return importlib.util.find_spec("apex.optimizers") is not None
    except ModuleNotFoundError:
        return False
