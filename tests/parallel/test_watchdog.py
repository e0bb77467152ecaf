"""What the watchdog says of a rank that died, hangs, failed, or waits for something else."""

from __future__ import annotations

import re

import torch.distributed as dist

from megatron_keye.parallel.activity import COLLECTIVES
from megatron_keye.parallel.watchdog import verdict

EXCHANGES = re.compile("_?(reduce|gather|scatter|broadcast|all|barrier|monitored_barrier|send|recv)")


def test_every_collective_of_this_torch_is_watched():
    methods = {name for name in dir(dist.ProcessGroup) if EXCHANGES.match(name)}
    assert methods == set(COLLECTIVES)


def said(**changes) -> dict:
    return {"status": "runs", "beat": 1, "step": 7, "waits": None, "at": "training/feed.py:42 take", **changes}


def test_the_verdict_names_rank_step_and_collective():
    me, waits = said(waits="all_reduce over ranks 0, 1, 2"), "all_reduce over ranks 0, 1, 2"
    other = said(waits=waits)
    told = lambda *states: [dict(s) for s in states]  # noqa: E731
    later = lambda states: [{**s, "beat": s["beat"] + 1} for s in states]  # noqa: E731

    before = told(me, other, said())
    text = verdict(0, 7, f"{waits} has hung for 5 s", before, later(before))
    assert (
        text
        == f"step 7: {waits} has hung for 5 s: rank 2 is not in it (last heard of in step 7 at training/feed.py:42 take)"
    )

    after = later(before)
    after[1]["beat"] = before[1]["beat"]
    assert "rank 1 is dead or stopped (last heard of in step 7" in verdict(0, 7, "x", before, after)
    assert "rank 2 is dead or stopped (never heard of)" in verdict(
        0, 7, "x", told(me, other, {}), [*later(told(me, other)), {}]
    )

    failed = later(told(me, other, said(status="failed (ValueError: no such layer)")))
    assert "rank 2 failed (ValueError: no such layer)" in verdict(0, 7, "x", before, failed)

    crossed = told(me, other, said(waits="broadcast over ranks 0, 2"))
    text = verdict(0, 7, "x", crossed, later(crossed))
    assert "x on rank 0, while rank 1 waits for all_reduce over ranks 0, 1, 2" in text
    assert "rank 2 waits for broadcast over ranks 0, 2" in text
