"""Health of the sparse attention against its definition, written out in float64 for one query after another."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa.quantise import fake_fp8
from megatron_keye.model.health import BLOCK, MOST_BLOCKS, PER_QUERY, measure, probe_blocks

TOPK, HEADS, GROUPS, DIM = 12, 4, 2, 8


def documents(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key ranges of packed documents."""
    start = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)]).int()
    return start, torch.arange(1, len(start) + 1).int()


def inputs(tokens: int, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HEADS, DIM), (tokens, GROUPS, DIM), (tokens, 3, DIM), (tokens, DIM), (tokens, 3))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_definition(q, k, iq, ik, iw, start, stop, blocks, quantised=False) -> dict[str, float]:
    """Means over the queries of `blocks`, from whole matrices; "mass 1" is of KV group 1."""
    visible = dsa.reference.range_mask(start, stop, len(k))
    p = dsa.reference._attend(q, k, k, visible, None)[2]  # [G, H / G, T, S]
    kinds = {"": p.mean((0, 1)), **{f" {g}": p[g].mean(0) for g in range(GROUPS)}}
    chosen = dsa.reference.select_topk(iq, ik, iw, start, stop, TOPK, fake_fp8=quantised)
    scores = (
        dsa.reference.index_scores(fake_fp8(iq), fake_fp8(ik), iw)
        if quantised
        else dsa.reference.index_scores(iq, ik, iw)
    )
    rows: list[dict[str, float]] = []
    for begin in blocks:
        for t in range(begin, begin + BLOCK):
            low, high, row = int(start[t]), int(stop[t]), {}
            omega = set(chosen[t].tolist())
            for name, whole in kinds.items():
                mine = whole[t, low:high]
                row[f"mass{name}"] = float(sum(whole[t, s] for s in omega))
                best = sorted(range(low, high), key=lambda s: -float(whole[t, s]))[:TOPK]
                row[f"set{name}"] = len(omega & set(best)) / TOPK
            mine, log_q = kinds[""][t, low:high], scores[t, low:high].log_softmax(-1)
            row["kl"] = float((mine * (mine.log() - log_q)).sum())
            row["entropy"] = float(-(log_q.exp() * log_q).sum())
            ranked = sorted(scores[t, low:high].tolist(), reverse=True)
            row["chance"] = TOPK / (high - low)
            row["ties"] = float(ranked[TOPK - 1] == ranked[TOPK])
            for n in (8, 16):
                company = range(begin + (t - begin) // n * n, begin + (t - begin) // n * n + n)
                row[f"union-{n}"] = len(set().union(*(chosen[o].tolist() for o in company))) / TOPK
            rows.append(row)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def means(vector: torch.Tensor) -> dict[str, float]:
    values = (vector[1:] / vector[0]).tolist()
    names = [*PER_QUERY, *(f"{name} {g}" for name in ("mass", "set") for g in range(GROUPS))]
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("quantised", [False, True])
def test_equals_the_definition(dtype, close, quantised):
    start, stop = documents(41, 70, 9, 56)
    narrow = inputs(len(start), dtype)
    blocks = probe_blocks(start, stop, TOPK)
    assert len(blocks) > 3
    vector = measure(*narrow, start, stop, TOPK, quantised=quantised)
    assert vector.dtype == torch.float64 and int(vector[0]) == len(blocks) * BLOCK
    # the same choice for both: in fp32 as the operator makes it, elsewhere in float64
    exact = [x.double() for x in narrow]
    expected = by_definition(*exact, start, stop, blocks, quantised)
    got = means(vector)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=close, abs=close), name


def test_an_indexer_that_knows_finds_everything_and_one_that_does_not_finds_little():
    start, stop = documents(160)
    q, k, *_ = inputs(160)
    q, k = q[:, :1].repeat(1, HEADS, 1), k[:, :1].repeat(1, GROUPS, 1)  # all heads alike, and sharp
    q = q * 6
    # relu(x) - relu(-x) = x: two heads give every product, of whatever sign
    knows = torch.stack([q[:, 0], -q[:, 0]], 1), k[:, 0], torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(160, 1)
    found = means(measure(q, k, *knows, start, stop, TOPK))
    assert (
        found["set"] == 1 and found["mass"] > 0.9 and found["kl"] == pytest.approx(0, abs=1e-9) and found["ties"] == 0
    )
    wrong = knows[0], knows[1], -knows[2]
    lost = means(measure(q, k, *wrong, start, stop, TOPK))
    assert lost["set"] < 0.1 and lost["mass"] < 0.05 and lost["kl"] > 5


def test_ties_and_unions_at_their_ends():
    """Scores that are all zero: every choice is a tie, the lowest keys win, and all queries choose alike."""
    start, stop = documents(64)
    q, k, iq, ik, iw = inputs(64)
    found = means(measure(q, k, iq, ik, torch.zeros_like(iw), start, stop, TOPK))
    assert (found["ties"], found["union-8"], found["union-16"]) == (1, 1, 1)
    # each query prefers itself and the keys before it: sixteen neighbours choose 15 more than one of them
    place = torch.arange(64, dtype=torch.float64)
    nearest = torch.ones(64, 1, 1, dtype=torch.float64), place[:, None], torch.ones(64, 1, dtype=torch.float64)
    found = means(measure(q, k, *nearest, start, stop, TOPK))
    assert found["union-8"] == pytest.approx((TOPK + 7) / TOPK) and found["union-16"] == pytest.approx(
        (TOPK + 15) / TOPK
    )
    assert found["ties"] == 0


def test_blocks_are_whole_of_one_document_and_have_something_to_choose():
    start, stop = documents(40, 100, 5, 600)
    blocks = probe_blocks(start, stop, TOPK)
    assert len(blocks) == MOST_BLOCKS and blocks == sorted(set(blocks))
    for begin in blocks:
        assert start[begin] == start[begin + BLOCK - 1] and stop[begin] - start[begin] > TOPK
    assert blocks[0] < 145 < blocks[-1]
    assert probe_blocks(*documents(TOPK), TOPK) == probe_blocks(*documents(*[TOPK] * 20), TOPK) == []
    # two pieces of a row side by side, as a context-parallel rank holds them: 24 + 24 of 96
    mine = torch.cat([torch.arange(24), torch.arange(72, 96)])
    start, stop = (x[mine] for x in documents(96))
    assert probe_blocks(start, stop, 4) == [32]  # the block from 16 on goes over the seam


def test_nothing_to_choose_is_no_measurement():
    start, stop = documents(*[TOPK] * 8)
    vector = measure(*inputs(len(start)), start, stop, TOPK)
    assert not vector.any() and len(vector) == 1 + len(PER_QUERY) + 2 * GROUPS


def test_no_tensor_grows_with_queries_times_keys():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and not func.is_view:
                    self.numel = max(self.numel, x.numel())
            return out

    tokens = 4096
    start, stop = documents(tokens)
    with Largest() as seen:
        vector = measure(*inputs(tokens, torch.float32), start, stop, 64)
    assert int(vector[0]) == BLOCK * MOST_BLOCKS
    assert tokens * HEADS * DIM <= seen.numel <= 2 * BLOCK * tokens * HEADS < tokens * tokens / 16
