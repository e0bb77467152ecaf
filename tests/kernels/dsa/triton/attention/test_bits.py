"""A bit a key for each query, from listed and from marked keys."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa.triton_backend.bits import query_bits


def unpacked(bits: torch.Tensor) -> torch.Tensor:
    """int32 [tiles,16] -> bool [16, tiles * 32]."""
    return ((bits[:, :, None] >> torch.arange(32)) & 1).bool().permute(1, 0, 2).flatten(1)


@pytest.mark.parametrize("name", ["causal", "ragged"])
@pytest.mark.parametrize("source", ["union", "words"])
def test_bits(source, name, make_case):
    case = make_case(name, 0.4)
    for view in case.views(source):
        bits = query_bits(view)
        assert bits is not None
        bits = bits.cpu()
        for block in range(view.chunk.num_blocks):
            rows = case.mask[view.chunk.rows.start + 16 * block :][:16]
            low, high = case.windows[:, view.chunk.rows.start // 16 + block].tolist()
            if source == "union":
                begin, end = view.union.start[block : block + 2].tolist()
                keys, place = view.union.keys[begin:end].long().cpu(), begin // 32 + 2 * block
            else:
                keys, place = torch.arange(low, high), block * (view.chunk.width // 32 + 2)
            got = unpacked(bits[place : place + -(-len(keys) // 64) * 2])
            assert torch.equal(got[: len(rows), : len(keys)], rows[:, keys])
            assert not got[len(rows) :].any()
            assert not got[:, len(keys) :].any()
