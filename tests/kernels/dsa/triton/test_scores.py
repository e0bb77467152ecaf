"""The indexer's scores against their definition in float64; exact where all is small integers."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend.blocks import Chunk, block_windows, chunks_of
from keye_kernels.dsa.triton_backend.scores import scores

LAYOUTS = ["causal", "tail", "packed", "more-queries", "ragged"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}  # operands are exact, sums in fp32


@pytest.fixture(autouse=True)
def _garbage_in_new_memory():
    """torch.empty gives NaN: an entry that somebody sees and nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(num_queries, num_keys, num_heads, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, num_heads, dim), (num_keys, dim), (num_queries, num_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def integer_inputs(num_queries, num_keys, num_heads, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, num_heads, dim), (num_keys, dim), (num_queries, num_heads)]
    return [torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in shapes]


def scored(inputs, start, stop, device, pairs=2500):
    """All chunks put together -> [T,S], NaN where no chunk reaches or nobody looks, and the mask of what is visible."""
    iq, ik, iw, start, stop = (x.to(device) for x in (*inputs, start, stop))
    whole = torch.full((len(iq), len(ik)), torch.nan)
    for chunk in chunks_of(block_windows(start, stop), len(iq), pairs):
        logits = scores(iq, ik, iw, start, stop, chunk)
        assert logits.dtype == torch.float32
        assert logits.shape == (chunk.num_rows, chunk.width)
        whole[chunk.rows, chunk.keys] = logits.cpu()
    return whole, reference.range_mask(start, stop, len(ik)).cpu()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("num_heads", "dim"), [(4, 32), (16, 64)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_near_the_definition(name, num_heads, dim, dtype, layout, device):
    num_queries, num_keys, start, stop = layout(name)
    inputs = random_inputs(num_queries, num_keys, num_heads, dim, dtype)
    got, visible = scored(inputs, start, stop, device)
    want = reference.index_scores(*(x.double() for x in inputs))
    error = (got.double() - want)[visible].abs().max() / want.abs().max()
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize(("num_heads", "dim"), [(1, 8), (3, 24), (5, 72), (32, 16), (130, 8), (4, 136)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_on_integers(num_heads, dim, dtype, layout, device):
    """Negative gates, head counts and dims that fill no tile: every bit equals the definition in float32."""
    num_queries, num_keys, start, stop = layout("ragged")
    inputs = integer_inputs(num_queries, num_keys, num_heads, dim, dtype)
    got, visible = scored(inputs, start, stop, device)
    assert torch.equal(got[visible], reference.index_scores(*(x.float() for x in inputs))[visible])


def test_gates_of_another_dtype(layout, device):
    num_queries, num_keys, start, stop = layout("tail")
    iq, ik, iw = random_inputs(num_queries, num_keys, 4, 32, torch.bfloat16)
    iw = iw.float() / 3
    got, visible = scored((iq, ik, iw), start, stop, device)
    want = reference.index_scores(iq.double(), ik.double(), iw.double())
    assert (got - want)[visible].abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_alone_has_the_same_bits(dtype, layout, device):
    """A decoding step, whose window and tiles begin elsewhere, against the whole pass."""
    num_queries, num_keys, start, stop = layout("packed")
    inputs = random_inputs(num_queries, num_keys, 4, 32, dtype)
    whole, _ = scored(inputs, start, stop, device, pairs=10**6)
    iq, ik, iw = (x.to(device) for x in inputs)
    for t in range(1, num_queries, 6):
        seen = slice(int(start[t]), int(stop[t]))
        row = slice(t, t + 1)
        bounds = start[row].to(device), stop[row].to(device)
        one = scores(iq[row], ik[: seen.stop], iw[row], *bounds, Chunk(slice(0, 1), seen))
        assert torch.equal(one[0].cpu(), whole[t, seen]), t


def test_tiles_that_nobody_sees_are_left_alone(device):
    """Two documents far apart: the first block's rows do not pay for, and do not write, the second's keys."""
    iq, ik, iw = integer_inputs(40, 5000, 4, 16, torch.bfloat16)
    start = torch.tensor([3] * 32 + [4500] * 8, dtype=torch.int32)
    stop = torch.tensor([140] * 32 + [4999] * 8, dtype=torch.int32)
    got, visible = scored((iq, ik, iw), start, stop, device, pairs=10**9)
    assert torch.equal(got[visible], reference.index_scores(iq.float(), ik.float(), iw.float())[visible])
    assert got[:32, 3 + 2048 :].isnan().all()
    assert got[32:, :2000].isnan().all()


@pytest.mark.parametrize("num_heads", [4, 3])
def test_broken_values_show(num_heads, device):
    """NaN and infinity in a key reach its scores and no others, padding heads or not."""
    iq, ik, iw = integer_inputs(20, 30, num_heads, 16, torch.float32)
    iq = iq.abs() + 1
    ik[4, 3], ik[9, 0], ik[11, 1] = torch.nan, torch.inf, -torch.inf
    iw = iw.abs() + 1
    start, stop = torch.zeros(20, dtype=torch.int32), torch.full((20,), 30, dtype=torch.int32)
    got, _ = scored((iq, ik, iw), start, stop, device)
    torch.testing.assert_close(got, reference.index_scores(iq, ik, iw), rtol=0, atol=0, equal_nan=True)
    assert got[:, 4].isnan().all()
    assert (got[:, 9] == torch.inf).all()
