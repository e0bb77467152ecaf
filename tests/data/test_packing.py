"""Packing invariants, over many random sets of samples."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import fill, lengths
from keye_data.packing import best_fit, collate
from keye_data.sample import IGNORE, EncodedSample, Media
from keye_data.video import Part

PAD = 7


def sample(key: str, length: int, rng: np.random.Generator) -> EncodedSample:
    ids = rng.integers(100, 1000, length)
    labels = np.where(rng.random(length) < 0.5, ids, IGNORE)
    media = [Media("image", [Part(key.encode(), [0])], (28, 28))]
    return EncodedSample(key, "source", ids, labels, rng.integers(0, 50, (3, length)), media)


def test_best_fit_by_hand():
    # 7 opens a row (3 left), 5 another (5 left), 4 goes with 5, 3 fills the first exactly
    assert best_fit([3, 7, 4, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([], 10) == []
    assert best_fit([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="11 tokens"):
        best_fit([11], 10)


def test_best_fit_uses_every_sample_once_and_fills_rows():
    rng = np.random.default_rng(1)
    for _ in range(200):
        capacity = int(rng.integers(1, 200))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 80))).tolist()
        rows = best_fit(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        totals = [sum(lengths[i] for i in row) for row in rows]
        assert all(total <= capacity for total in totals)
        # no two rows could have been one
        assert len(totals) < 2 or sum(sorted(totals)[:2]) > capacity
        assert rows == best_fit(lengths, capacity)


def test_the_default_buffer_fills_rows():
    sizes = lengths.read()
    assert len(sizes) == 10_000 and max(sizes) <= lengths.ROW
    assert sizes == lengths.generate()  # the committed list is the documented one
    found = fill.measure(sizes)
    assert found["share_above_an_eighth"] >= 0.5  # small samples alone would make it easy
    assert found["fill_with_default"] >= fill.TARGET
    assert found["fill"]["16"] < fill.TARGET  # the figure follows the buffer


def test_the_packing_benchmark_refuses_a_wrong_packing():
    sizes = [3, 7, 4, 5]
    fill.gate([[0, 1], [2, 3]], sizes, 10)
    for rows in ([[0, 1], [2]], [[0, 1], [2, 3], [3]]):
        with pytest.raises(ValueError, match="lost or repeated"):
            fill.gate(rows, sizes, 10)
    with pytest.raises(ValueError, match="more than 10"):
        fill.gate([[0], [1, 2], [3]], sizes, 10)


def test_collate_keeps_documents_apart():
    rng = np.random.default_rng(2)
    for trial in range(30):
        length = int(rng.integers(8, 64))
        lengths = rng.integers(1, length + 1, int(rng.integers(1, 12))).tolist()
        samples = [sample(f"{trial}/{i}", n, rng) for i, n in enumerate(lengths)]
        rows = [[samples[i] for i in row] for row in best_fit(lengths, length)]
        packed = collate(rows, length, PAD)
        placed = {document.key: document for document in packed.documents}
        assert len(placed) == len(samples)
        covered = np.zeros(packed.input_ids.shape, dtype=int)
        for item in samples:
            at = placed[item.key]
            span = (at.row, slice(at.begin, at.end))
            covered[span] += 1
            assert (packed.input_ids[span] == item.input_ids).all()
            assert (packed.position_ids[(slice(None), *span)] == item.position_ids).all()
            # each token sees its own document up to itself: nothing crosses a border
            assert (packed.key_start[span] == at.begin).all()
            assert (packed.key_stop[span] == np.arange(at.begin, at.end) + 1).all()
            # the next token of the same document, where it is learned; none at the end
            assert packed.targets[span].tolist() == [*item.labels[1:].tolist(), IGNORE]
            assert at.media == item.media
        assert covered.max() == 1
        padding = covered == 0
        assert (packed.input_ids[padding] == PAD).all() and (packed.targets[padding] == IGNORE).all()
        assert (packed.key_start[padding] == packed.key_stop[padding]).all()
        assert packed.key_start.dtype == packed.key_stop.dtype == np.int32
        order = [(d.row, d.begin) for d in packed.documents]
        assert order == sorted(order)


def test_collate_refuses_an_overfull_row():
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="b: row 0 holds more than 10"):
        collate([[sample("a", 6, rng), sample("b", 5, rng)]], 10, PAD)
