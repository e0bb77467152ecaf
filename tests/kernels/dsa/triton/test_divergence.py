"""The indexer's loss and its gradient with respect to the scores, against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from loss_cases import define, error, logits_of, make_case, poison, stored_of, wide

from keye_kernels.dsa.triton_backend.divergence import divergence
from keye_kernels.dsa.triton_backend.score_gradient import score_gradient

BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = [("packed", None), ("ragged", 1500), ("tail", 1700), ("more-queries", None)]
both = pytest.mark.parametrize("sparse", [True, False], ids=["union", "range"])


def run_divergence(case, want, scores=None):
    """kl and student_lse [T] over all chunks; what is in no chunk, 0."""
    kl, student_lse = torch.zeros(2, len(case.q), device=case.q.device)
    for chunk in case.chunks:
        kl[chunk.rows] = student_lse[chunk.rows] = torch.nan
        divergence(
            stored_of(case, want.p, chunk), logits_of(case, want.scores if scores is None else scores, chunk), case.heads,
            case.key_start, case.key_stop, case.windows, chunk, kl, student_lse, case.union(chunk),
        )  # fmt: skip
    return kl, student_lse


@both
@pytest.mark.parametrize("name, pairs", LAYOUTS)
def test_divergence_is_its_definition(device, layout, name, pairs, sparse):
    case = make_case(layout, name, device, sparse, pairs=pairs)
    want = define(case)
    kl, student_lse = run_divergence(case, want)
    assert error(kl, want.kl) < 1e-6
    assert error(student_lse, want.student_lse) < 1e-6
    alone = case.mask.sum(-1) == 1
    assert (kl[alone].abs() < 1e-6).all()  # one key: both are certain of it
    assert (kl[~case.mask.any(-1)] == 0).all()


@both
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_scores_of_any_size_cancel(device, layout, sparse, offset):
    """Scores about 100 apart on top of a large offset: the loss is what the differences make it, to rounding of the scores."""
    case = make_case(layout, "ragged", device, sparse, size=30.0)
    want = define(case)
    rounded = (want.scores + offset).float().double()  # the float32 scores are what they are; the sums must add no more
    assert want.scores[case.mask].abs().max() > 100
    kl, student_lse = run_divergence(case, want, rounded)
    teacher = want.p / case.heads
    log_student = rounded.masked_fill(~case.mask, -torch.inf).log_softmax(-1).masked_fill(~case.mask, 0)
    seen = case.mask.any(-1)
    expected = torch.where(seen, (torch.special.xlogy(teacher, teacher) - teacher * log_student).sum(-1), 0)
    assert error(kl, expected) < 1e-6
    assert error(student_lse[seen], (rounded.masked_fill(~case.mask, -torch.inf).logsumexp(-1))[seen]) < 1e-6


@both
def test_many_tiles(device, sparse):
    """The greatest score rises from tile to tile: what has been summed follows it. And the gradient, over several programs."""
    case = make_case(wide, "wide", device, sparse, topk=400, size=3.0)
    want = define(case)
    want.scores += torch.linspace(-60, 60, case.mask.shape[1], device=device)
    teacher = want.p / case.heads
    log_student = want.scores.masked_fill(~case.mask, -torch.inf).log_softmax(-1).masked_fill(~case.mask, 0)
    kl, _ = run_divergence(case, want)
    assert error(kl, (torch.special.xlogy(teacher, teacher) - teacher * log_student).sum(-1)) < 1e-6
    check_score_gradient(case, 2e-6)


def test_scores_that_are_not_finite_show(device, layout):
    case = make_case(layout, "causal", device, True)
    want = define(case)
    want.scores[50, case.mask[50].nonzero()[0]] = torch.nan
    kl, _ = run_divergence(case, want)
    assert kl.isnan().nonzero().tolist() == [[50]]


INDEXERS = [((4, 32), FP32), ((16, 64), BF16), ((3, 16), BF16), ((4, 32), BF16), ((20, 128), BF16)]


@both
@pytest.mark.parametrize("name, pairs", LAYOUTS)
def test_score_gradient_is_autograd(device, layout, name, pairs, sparse):
    check_score_gradient(make_case(layout, name, device, sparse, pairs=pairs), 2e-6)


@pytest.mark.parametrize("indexer, dtype", INDEXERS)
def test_scores_of_a_union_are_formed_anew(device, layout, indexer, dtype):
    check_score_gradient(make_case(layout, "ragged", device, True, dtype, indexer=indexer), 2e-6)


def test_large_scores_keep_their_gradient(device, layout):
    """exp(I - lse) of scores near 100 carries their rounding, 100 * 2**-24, and nothing more."""
    check_score_gradient(make_case(layout, "ragged", device, True, size=30.0), 3e-5)


def check_score_gradient(case, tolerance: float) -> None:
    want = define(case)
    for chunk in case.chunks:
        p = stored_of(case, want.p, chunk)
        with poison():
            score_gradient(
                p, case.heads, case.iq, case.ik, case.iw, want.student_lse.float(), case.grad_kl, case.key_start,
                case.key_stop, case.windows, chunk, case.union(chunk), logits_of(case, want.scores, chunk),
            )  # fmt: skip
        got = case.matrix(p, chunk)
        assert error(got, want.d_scores[chunk.rows]) < tolerance
        assert (got[~case.mask[chunk.rows]] == 0).all()
