"""A Hugging Face folder of several GB: Keye's own widths with a few of its layers, filled with noise.

python tests/tools/large_checkpoint.py OUT [LAYERS]      # 4 layers: 6.5 GB, bf16, fused experts
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from megatron_keye.config.model import ModelConfig, build_config
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.conversion.layout import whole_shapes
from megatron_keye.model.hf_config import write_config
from megatron_keye.model.hf_files import publishing, write_tensors
from megatron_keye.model.hf_stream import Lazy
from megatron_keye.parallel import plan

NOISE = torch.from_numpy(np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 25, dtype=np.int16))  # 64 MB


def config(layers: int) -> ModelConfig:
    return build_config("keye_vl2_30b_a3b", num_layers=layers, vision_layers=2)


def noise(name: str, shape: tuple[int, ...]) -> Lazy:
    """The same noise for the same name, from a place that the name decides: no two tensors are alike."""
    count = int(np.prod(shape))

    def blocks() -> list[torch.Tensor]:
        start = zlib.crc32(name.encode()) % len(NOISE)
        turned = torch.cat([NOISE[start:], NOISE[:start]]) if count > len(NOISE) - start else NOISE[start:]
        repeated = turned.repeat(-(-count // len(turned))) if count > len(turned) else turned
        return [repeated[:count].view(torch.bfloat16).reshape(shape)]

    return Lazy(shape, torch.bfloat16, blocks)


def write(folder: Path, layers: int = 4) -> int:
    """-> bytes of all tensors"""
    cfg = config(layers)
    shapes = whole_shapes(cfg, ParallelConfig())
    plan.shut_down()
    with publishing(folder) as draft:
        write_tensors(draft, [(name, noise(name, shape)) for name, shape in shapes.items()], "fused", 2_000_000_000)
        write_config(cfg, draft, "bfloat16")
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4):,} bytes")
