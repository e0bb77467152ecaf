"""What tools/convert.py does: import, export, verify."""

from __future__ import annotations

import torch

from megatron_keye.conversion.exporting import export
from megatron_keye.conversion.importing import import_hf
from megatron_keye.conversion.parts import Start
from megatron_keye.conversion.verifying import verify

__all__ = ["DTYPES", "Start", "export", "import_hf", "verify"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
