"""Entries are added key by key, in their own order."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa.triton_backend.segments import add_segments, segments_of


@pytest.mark.parametrize("shape", [(), (1,), (2, 24), (600,)])
@pytest.mark.parametrize("entries", [0, 1, 37])
def test_sums(entries, shape, device):
    generator = torch.Generator().manual_seed(entries)
    keys = torch.randint(4, 17, (entries,), generator=generator).int()
    values = torch.randn(entries, *shape, generator=generator)
    target = torch.randn(19, *shape, generator=generator)
    want = target.clone()
    for key in range(4, 17):
        total = torch.zeros(shape)
        for value in values[keys == key]:
            total = total + value
        want[key] += total
    got = target.to(device)
    add_segments(segments_of(keys.to(device), slice(4, 17)), values.to(device), got)
    assert torch.equal(got.cpu(), want)


def test_order_decides_the_bits(device):
    """2^24 + 1 + 1 loses both ones in this order, and keeps them in the other."""
    keys = torch.tensor([3, 5, 3, 5, 3, 5], dtype=torch.int32, device=device)
    values = torch.tensor([2.0**24, 1, 1, 1, 1, 2.0**24], device=device)[:, None]
    target = torch.zeros(6, 1, device=device)
    add_segments(segments_of(keys, slice(2, 6)), values, target)
    assert target[:, 0].tolist() == [0, 0, 0, 2.0**24, 0, 2.0**24 + 2]
