"""Keye-VL-2.0 as Megatron-Core modules: the Python interface for notebooks and tests (one process).

import megatron_keye.model as m
cfg = m.build_config("keye_mini", attention_mode="sparse")
model = m.build_model(cfg)
logits = model(input_ids)                       # [B, T, V]
loss = model(input_ids, labels=input_ids)       # scalar
model = m.from_hf("folder")                     # a Hugging Face folder: Keye's, or plain Qwen3-MoE's
m.to_hf(model, "exported")
"""

from typing import TYPE_CHECKING, Any

import megatron_keye.parallel  # noqa: F401  (first: it makes Megatron-Core usable without CUDA)
from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.model.keye import KeyeModel, build_model

if TYPE_CHECKING:
    from megatron_keye.model.hf import from_hf, to_hf

__all__ = ["KeyeModel", "ModelConfig", "build_config", "build_model", "from_hf", "to_hf"]


def __getattr__(name: str) -> Any:
    """Hugging Face's side needs more packages than the model, and is loaded when it is asked for."""
    if name not in ("from_hf", "to_hf"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_keye.model import hf

    return getattr(hf, name)
