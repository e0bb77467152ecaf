"""Who computes what. Importing this package makes Megatron-Core usable on a CPU (see cpu.py)."""

from megatron_keye.parallel import cpu

cpu.install()
