"""A mistake on one rank is raised there and ends the others, without a word and without a wait."""

from __future__ import annotations

from launch import launch

from keye_data.errors import DataError
from megatron_keye.errors import ElsewhereError
from megatron_keye.parallel import plan
from megatron_keye.parallel.together import together


def one_rank_fails() -> str:
    rank = plan.dist.get_rank()

    def part() -> int:
        if rank == 1:
            raise DataError("shards are missing")
        return rank

    try:
        together(part)
    except DataError as error:
        return str(error)
    except ElsewhereError as error:
        return f"elsewhere: {error}"
    return "nothing"


def none_fails() -> int:
    return together(plan.dist.get_rank)


def test_one_rank_speaks_and_all_end():
    assert launch(one_rank_fails, 3) == [
        "elsewhere: rank 1 reports the error",
        "shards are missing",
        "elsewhere: rank 1 reports the error",
    ]


def test_results_are_each_ranks_own():
    assert launch(none_fails, 2) == [0, 1]
