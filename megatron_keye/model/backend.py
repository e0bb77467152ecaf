"""Which implementations the layers are built from: Transformer Engine's where CUDA and it are there, Megatron's own otherwise.

Chosen in this one place, printed by the trainer. Norms stay apart from the linear layers in both, because the indexer
needs the normalised hidden states; so the checkpoint's keys are the same too.
Transformer Engine's side is unverified: its structure is tested with a stand-in, no machine of ours has run it.
"""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from megatron_keye.model.experts import GroupedExperts
from megatron_keye.model.norms import RMSNorm


class LocalBackend(LocalSpecProvider):
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm  # Megatron's torch norm refuses sequence parallelism

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple:
        if moe_use_grouped_gemm:  # Megatron's own wants a package of CUDA kernels
            return GroupedExperts, None
        return super().grouped_mlp_modules(False, False)


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def backend() -> BackendSpecProvider:
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalBackend()


def describe() -> str:
    """One line for the log."""
    layers = "Transformer Engine (unverified)" if has_transformer_engine() else "Megatron-Core's local layers"
    norm = backend().layer_norm(rms_norm=True)
    return f"{layers}; norm {full_name(norm)}; optimizer {full_name(adam())}"


def adam() -> type:
    """Megatron takes Transformer Engine's Adam, else Apex's, else torch's, when it is imported."""
    from megatron.core import optimizer

    return torch.optim.AdamW if optimizer.USING_PYTORCH_OPTIMIZER else optimizer.Adam


def full_name(cls: type) -> str:
    """`torch.optim.adamw.AdamW` -> `torch AdamW`"""
    return f"{cls.__module__.partition('.')[0]} {cls.__qualname__}"
