"""Traces: what is assembled from small ones against the real schedule traced whole, work against its formula, traffic by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_keye.config.load import load_recipe
from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.estimate import estimate, survey_stages
from megatron_keye.planning.flops import step_flops
from megatron_keye.planning.ghost import Ghosts
from megatron_keye.planning.hardware import H200, link_bytes
from megatron_keye.planning.ledger import Ledger, Sent
from megatron_keye.planning.stages import build_stages
from megatron_keye.planning.survey import planned_batch, survey
from megatron_keye.planning.trace import traced

STAGE1 = Path(__file__).resolve().parents[3] / "recipes" / "stage1.yaml"
MINI = ["profile=mini", "model.num_layers=8", "data.seq_length=1024", "model.vocab_size=2000", "model.image_token_id=1998",
        "model.video_token_id=1999"]  # fmt: skip


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()
    yield


def recipe(*overrides: str):
    return load_recipe(STAGE1, [*MINI, *overrides])


@pytest.mark.parametrize("virtual", [None, 2])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_in_flight_micro_batches_are_those_of_the_schedule(virtual, recompute):
    """All eight layers on four stages, Megatron's own schedule, against one and two layers and one and two micro-batches."""
    layout = ["parallel.pipeline=4", "training.global_batch_size=8", f"training.recompute={recompute}"]
    chosen = recipe(*layout, *([f"parallel.virtual_pipeline={virtual}"] if virtual else []))
    found = estimate(chosen, 4, build_stages(chosen), H200, survey_stages(chosen, 4))
    for stage, parts in enumerate(found.stages):
        with traced(chosen, stage) as step:
            phases = step.language([planned_batch(chosen) for _ in range(8)])
        real = max(phase.peak for phase in phases.values())
        assert sum(parts.values()) == pytest.approx(real, rel=0.1), stage


def test_work_is_that_of_the_formula():
    """The language model's matrix products: forward, and twice that backward; the router's in fp32 are among them."""
    chosen = recipe("model.num_layers=4")
    seen = survey(chosen, 1, pictures=False)
    batch = planned_batch(chosen, pictures=False)
    traced_flops = seen.stage(4, 1).flops("matrix", "attention")
    # the formula counts attention backward as twice forward; the kernels form the scores once more
    attention = 3 * 4.0 * 4 * 4 * 64 * int((batch.key_stop - batch.key_start).sum())
    assert traced_flops == pytest.approx(step_flops(chosen.model, [batch]) + attention / 6, rel=0.01)


def test_recomputation_is_counted_as_issued():
    none, full = (survey(recipe(f"training.recompute={r}"), 1, pictures=False).layer.flops() for r in ("none", "full"))
    # forward, and backward of twice that (attention two and a half times): a third more, less for attention's part
    assert 1.25 < full / none < 1.34


def test_traffic_by_hand():
    """64 MiB of activations over 8 ranks of a node, and over two nodes of 8; each rank keeps its own part."""
    node, two_nodes = tuple(range(8)), tuple(range(16))
    size = 64 * 2**20
    assert link_bytes(H200, Sent("allgather", node, size), node) == (size * 7 / 8, 0)
    assert link_bytes(H200, Sent("allreduce", node, size), node) == (2 * size * 7 / 8, 0)
    assert link_bytes(H200, Sent("alltoall", two_nodes, size), two_nodes) == (size * 7 / 16, size * 8 / 16)
    # half of it lies on the other node, and 8 cards share the carrying
    assert link_bytes(H200, Sent("allgather", two_nodes, size), two_nodes) == (size * 15 / 16, size / 2 / 8)


def test_a_layer_sends_what_tensor_and_expert_parallelism_need():
    """Forward: rows gathered before qkv and scattered after the projection; tokens to experts and back. Backward likewise."""
    chosen = recipe("parallel.tensor=2", "parallel.expert=4", "parallel.expert_tensor=1", "model.num_experts=8")
    cfg, rows = chosen.model, chosen.data.seq_length
    sent = survey(chosen, 1, pictures=False).layer.sent
    by_kind = Counter({(s.what, len(s.ranks)): 0 for s in sent})
    for s, count in sent.items():
        if s.bytes >= rows // 2 * cfg.hidden_size * 4:  # leaves out counts and probabilities
            by_kind[s.what, len(s.ranks)] += count
    assert by_kind["allgather", 2] == 3  # forward; backward of the scatter; the input of the weights' gradient again
    assert by_kind["reduce_scatter", 2] == 2
    tokens = rows // 2 * cfg.experts_per_token
    exchanges = {
        s.bytes: n for s, n in sent.items() if s.what == "alltoall" and s.bytes >= tokens * cfg.hidden_size * 4
    }
    assert exchanges == {tokens * cfg.hidden_size * 4: 4}  # there and back, forward and backward


def test_ghosts_take_decisions_as_a_plan_would():
    ledger = Ledger()
    with Ghosts(ledger):
        scores = torch.rand(6, 8, device="cpu")
        values, picks = scores.topk(2)
        mask = torch.tensor([True, False, True, False, True, False])
        some = scores[mask]
        counts = torch.bincount(picks.flatten(), minlength=8)
        order = torch.arange(8, device="cpu").view(2, 4).T.ravel()
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7], "integers, though nobody named their type"
    assert scores.is_meta and values.is_meta and not picks.is_meta
    assert some.shape == (3, 8) and some.is_meta
    assert counts.tolist() == [2, 2, 2, 2, 1, 1, 1, 1]
    assert (picks[:, 0] != picks[:, 1]).all()
    held = ledger.live
    del values, some
    assert held - ledger.live == 6 * 2 * 4 + 3 * 8 * 4
