"""The teacher against its definition in float64: every head count and layout, over unions and over whole ranges."""

from __future__ import annotations

import pytest
import torch
from loss_cases import ATTENTION_SCALE, define, error, make_case, poison

from keye_kernels.dsa.triton_backend.teacher import teacher

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # layout, heads, dim, dtype, pairs in a chunk
    ("packed", (4, 2), 32, BF16, None),
    ("ragged", (4, 4), 64, BF16, 1500),
    ("tail", (8, 2), 32, FP32, 1700),
    ("more-queries", (8, 1), 40, FP16, None),
    ("causal", (6, 2), 128, BF16, 2000),
    ("packed", (24, 2), 32, BF16, None),  # 12 heads to a KV head: two dots, the second half filled
]


@pytest.mark.parametrize("sparse", [True, False], ids=["union", "range"])
@pytest.mark.parametrize("name, heads, dim, dtype, pairs", CASES)
def test_teacher_is_its_definition(device, layout, name, heads, dim, dtype, pairs, sparse):
    case = make_case(layout, name, device, sparse, dtype, heads, dim, pairs=pairs)
    want = define(case)
    assert (pairs is None) == (len(case.chunks) == 1)
    for chunk in case.chunks:
        with poison():
            p = teacher(
                case.q, case.k, want.lse.float(), ATTENTION_SCALE, case.key_start, case.key_stop, case.windows, chunk,
                case.union(chunk),
            )  # fmt: skip
        got = case.matrix(p, chunk)
        # products of 16-bit numbers are exact in float32, so that narrow inputs cost nothing here
        assert error(got, want.p[chunk.rows]) < 2e-6
        assert (got[~case.mask[chunk.rows]] == 0).all()


def test_many_keys_make_many_programs(device, interpreted):
    """More keys than one program takes, on both sides of a segment's end."""
    num_keys = 300 if interpreted else 3000
    start, stop = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([num_keys, num_keys - 40], dtype=torch.int32)
    dtype = FP32 if interpreted else BF16  # a segment is 256 keys in float32, 1024 in 16 bits
    case = make_case(lambda _: (2, num_keys, start, stop), "wide", device, True, dtype, topk=num_keys - 45)
    want, chunk = define(case), case.chunks[0]
    with poison():
        p = teacher(
            case.q, case.k, want.lse.float(), ATTENTION_SCALE, case.key_start, case.key_stop, case.windows, chunk,
            case.union(chunk),
        )  # fmt: skip
    assert error(case.matrix(p, chunk), want.p) < 2e-6


def test_an_unseen_key_of_huge_agreement_does_not_spill(device, layout):
    """exp(logit - lse) overflows for a key outside the selection; it must not become NaN or reach a sum."""
    case = make_case(layout, "causal", device, True, FP32)
    case.mask[:, 30] = False
    case.mask[45, 30] = True  # so that the block's union holds the key
    case.q[45] = 0
    case.k[30] = 3e4 * case.q[44, 0]
    want = define(case)
    for chunk in case.chunks:
        p = teacher(
            case.q, case.k, want.lse.float(), ATTENTION_SCALE, case.key_start, case.key_stop, case.windows, chunk,
            case.union(chunk),
        )  # fmt: skip
        assert error(case.matrix(p, chunk), want.p[chunk.rows]) < 2e-6
