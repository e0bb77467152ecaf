"""The model of time against published runs: fitted on the 4K row, asked for the 32K row."""

from __future__ import annotations

import pytest

from megatron_keye.parallel.plan import shut_down
from megatron_keye.planning.anchors import (
    ANCHORS,
    AT_2K,
    AT_4K,
    AT_32K,
    PUBLISHED_KERNELS,
    WORLD,
    fitted,
    predicted_seconds,
)


@pytest.fixture(autouse=True)
def leaves_no_groups():
    shut_down()
    yield


@pytest.fixture(scope="module")
def machine():
    shut_down()
    return fitted()


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: anchor.name)
def test_published_figures_agree_with_one_another(anchor):
    """Rows times tokens in the published time are the published rate: units and batch sizes are read as they are meant."""
    rate = anchor.global_batch_size * anchor.seq_length / anchor.seconds / WORLD
    assert rate == pytest.approx(anchor.tokens_per_second_and_gpu, rel=1e-4)


def test_fit_reproduces_the_row_it_was_made_from(machine):
    assert 0 < machine.unhidden < 1
    assert predicted_seconds(AT_4K, machine) == pytest.approx(AT_4K.seconds, rel=0.01)


def test_nothing_hidden_is_near_the_short_fine_tuning_run():
    """The same stack without CUDA graphs or overlap, 2K rows: nothing is fitted here. Its experts are chosen unevenly,
    which a plan leaves out (at 4K the same source's run with natural routing takes 1.5 times the even one)."""
    assert 0.65 < predicted_seconds(AT_2K, PUBLISHED_KERNELS) / AT_2K.seconds < 1.0


@pytest.mark.xfail(
    strict=True,
    reason="with 2,048 tokens of a row on each GPU, as in the 2K run, the published 32K run takes seven times as long for it: "
    "nothing of that is in the 4K row, which has neither tensor nor context parallelism. See README.md",
)
def test_rates_of_the_4k_row_predict_the_32k_row(machine):
    assert predicted_seconds(AT_32K, machine) == pytest.approx(AT_32K.seconds, rel=0.3)
