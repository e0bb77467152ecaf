"""mRoPE positions against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keye_data.positions import mrope_positions

IMAGE, VIDEO = 900, 901


def test_text_only():
    assert mrope_positions([5, 6, 7], None, IMAGE, VIDEO).tolist() == [[0, 1, 2]] * 3
    assert mrope_positions([], None, IMAGE, VIDEO).shape == (3, 0)


def test_image_between_text():
    # two text tokens, an image of 2 x 3 tokens (4 x 6 patches), two text tokens
    ids = [1, 2, *[IMAGE] * 6, 3, 4]
    assert mrope_positions(ids, [[1, 4, 6]], IMAGE, VIDEO).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_frames_with_markers_between():
    # each frame 2 x 1 tokens; base of the second = 1 + (maximum so far = 2, then two markers 3, 4)
    ids = [1, VIDEO, VIDEO, 2, 3, VIDEO, VIDEO, 4]
    assert mrope_positions(ids, [[1, 4, 2], [1, 4, 2]], IMAGE, VIDEO).tolist() == [
        [0, 1, 1, 3, 4, 5, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 1, 3, 4, 5, 5, 7],
    ]


def test_adjacent_pictures_are_told_apart_by_their_grids():
    ids = [IMAGE] * 3
    assert mrope_positions(ids, [[2, 2], [2, 4]], IMAGE, VIDEO).tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 2]]


def test_tensors_give_the_same():
    ids = [1, *[IMAGE] * 4, 2]
    want = mrope_positions(ids, [[1, 4, 4]], IMAGE, VIDEO)
    got = mrope_positions(torch.tensor(ids), torch.tensor([[1, 4, 4]]), IMAGE, VIDEO)
    assert got.dtype == np.int64 and (got == want).all()
    assert (
        mrope_positions(torch.tensor([1, 2]), torch.empty(0, 3, dtype=torch.long), IMAGE, VIDEO).tolist()
        == [[0, 1]] * 3
    )


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([IMAGE] * 4, [[1, 4, 6]], "want 6"),
        ([IMAGE] * 6, [[1, 4, 4]], "cover 4"),
        ([IMAGE], None, "cover 0"),
        ([IMAGE, 1, IMAGE], [[1, 4, 2]], "in a row"),
        ([IMAGE, VIDEO], [[1, 4, 2]], "of one kind"),
        ([IMAGE] * 2, [[2, 2, 2]], "t = 1"),
        ([IMAGE] * 2, [[1, 3, 2]], "multiples of 2"),
        ([IMAGE] * 2, [4, 2], r"\[N, 2\]"),
    ],
)
def test_disagreement_is_an_error(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, grids, IMAGE, VIDEO)
