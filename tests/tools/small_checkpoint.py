"""A Hugging Face folder of a mini Keye, no two tensors of which are alike, for tests that convert it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import megatron_keye.model as m
from tests.parallel.trained import recipe_for

BF16, FP32 = torch.bfloat16, torch.float32


def write(folder: Path, dtype: torch.dtype, experts: str = "fused") -> Path:
    """The model that `recipe_for` trains."""
    model = m.build_model(recipe_for({}, "bf16").model, dtype)
    with torch.no_grad():  # norms and biases start alike
        for i, parameter in enumerate(model.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    m.to_hf(model, folder, experts)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by their names in the files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(folder)
    assert found.keys() == expected.keys()
    wide = {2: torch.int16, 4: torch.int32}
    for name, tensor in expected.items():
        kind = wide[tensor.element_size()]
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name].view(kind), tensor.view(kind)), name
