"""Shares of the sources, and the rows that leave a packing buffer."""

from __future__ import annotations

import numpy as np
import pytest

from keye_data.blend import shares
from keye_data.packing import best_fit, rows_to_send
from keye_data.settings import SourceConfig

SOURCES = [
    SourceConfig("a", 3.0),
    SourceConfig("b", 1.0),
    SourceConfig("c", 6.0, "long"),
    SourceConfig("d", 2.0, "long"),
]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (None, [3 / 12, 1 / 12, 6 / 12, 2 / 12]),
        (1.0, [3 / 8, 1 / 8, 6 / 16, 2 / 16]),
        (0.25, [0.8 * 3 / 4, 0.8 / 4, 0.2 * 6 / 8, 0.2 * 2 / 8]),
    ],
)
def test_weights_share_within_a_kind_and_the_ratio_between_kinds(ratio, expected):
    assert shares(SOURCES, ratio) == pytest.approx(expected)


def test_rows_wait_for_company_but_not_for_ever():
    """As the loader packs: what is left of a buffer goes into the next; all arrive, in full rows, none much too late."""
    lengths = np.random.default_rng(0).integers(1, 1001, 3000).tolist()  # uniform, which is hard to pack
    buffer: list[int] = []
    sent: list[int] = []
    came: dict[int, int] = {}
    rows = rounds = late = 0
    while len(sent) < len(lengths):
        while len(buffer) < 64 and len(came) < len(lengths):
            buffer.append(len(came))
            came[len(came)] = rounds
        sizes = [lengths[i] for i in buffer]
        packed = best_fit(sizes, 1000)
        if len(came) < len(lengths):
            packed = rows_to_send(packed, sizes, 1000)
        assert packed and all(sum(sizes[i] for i in row) <= 1000 for row in packed)
        out = {buffer[i] for row in packed for i in row}
        late = max(late, *(rounds - came[i] for i in out))
        sent += out
        rows, rounds = rows + len(packed), rounds + 1
        buffer = [i for i in buffer if i not in out]
    assert sorted(sent) == list(range(len(lengths)))
    assert 0 < late < 64
    plain = sum(len(best_fit(lengths[i : i + 64], 1000)) for i in range(0, len(lengths), 64))
    assert sum(lengths) / rows / 1000 > 0.96 and sum(lengths) / plain / 1000 < 0.93  # waiting is worth it
