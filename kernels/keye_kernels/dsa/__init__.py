"""DeepSeek-style sparse attention over grouped-query heads: indexer, top-k, attention and indexer loss.

from keye_kernels import dsa
out, kl = dsa.dsa_attention(q, k, v, iq, ik, iw, key_start, key_stop, topk=2048)

README.md in this folder gives the mathematics, the contract and the backends.
"""

from __future__ import annotations

from . import reference
from .ops import dense_attention, dsa_attention, select_topk, sparse_attention

__all__ = ["dense_attention", "dsa_attention", "reference", "select_topk", "sparse_attention"]
