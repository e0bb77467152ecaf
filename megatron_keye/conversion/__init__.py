"""Between Hugging Face folders and training checkpoints (tools/convert.py)."""

import megatron_keye.parallel  # noqa: F401  (first: it makes Megatron-Core usable without CUDA)
