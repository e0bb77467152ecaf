"""3-axis position ids against Qwen2.5-VL's and Qwen3-VL's get_rope_index; integers, so equality.

The same in all three: text, pictures of any shape, several pictures, padding left out. With videos:
- Qwen3-VL cuts a video into frames, each a picture of its own after its timestamp: the same as ours.
- Qwen2.5-VL keeps a video as one block of t frames: h and w begin anew in every frame, t advances by tokens_per_second *
  seconds per grid, and the text goes on behind the height and width alone, whatever t has reached. We never do that: no
  frame shares its h and w with another, no position depends on the frame rate. The last tests write both down.
- Qwen3-VL finds frames by what stands between them, so two pictures side by side become one; ours reads the grids.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

from keye_data.positions import mrope_positions

IMAGE, VIDEO, TEXT = 90, 91, 7


def tiny(config_class, model_class):
    config = config_class(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
    with torch.device("meta"):
        return model_class(config)


@pytest.fixture(scope="module")
def qwen25() -> Qwen2_5_VLModel:
    return tiny(Qwen2_5_VLConfig, Qwen2_5_VLModel)


@pytest.fixture(scope="module")
def qwen3() -> Qwen3VLModel:
    return tiny(Qwen3VLConfig, Qwen3VLModel)


def row(*parts: int | tuple[int, int, int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Numbers are that much text; (token, down, across) is a picture or frame of so many patches -> ids, grids."""
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
        else:
            token, down, across = part
            ids += [token] * (down * across // 4)
            grids.append((1, down, across))
    return ids, grids


def theirs(model, ids: list[int] | Tensor, images=None, videos=None, **more) -> Tensor:
    ids = torch.as_tensor(ids).reshape(-1, torch.as_tensor(ids).shape[-1])
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grids = {
        name: torch.tensor(value)
        for name, value in (("image_grid_thw", images), ("video_grid_thw", videos))
        if value is not None
    }
    return model.get_rope_index(ids, kinds, **grids, **more)[0]


def ours(ids: list[int], grids) -> Tensor:
    return torch.from_numpy(mrope_positions(ids, grids, IMAGE, VIDEO))


ROWS = {
    "text": row(9),
    "picture first": row((IMAGE, 4, 6), 5),
    "picture last": row(3, (IMAGE, 6, 2)),
    "wide, tall, smallest": row(4, (IMAGE, 2, 20), 1, (IMAGE, 18, 4), 2, (IMAGE, 2, 2), 30, (IMAGE, 8, 8), 1),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("oracle", ["qwen25", "qwen3"])
def test_text_and_pictures(oracle: str, name: str, request: pytest.FixtureRequest):
    ids, grids = ROWS[name]
    expected = theirs(request.getfixturevalue(oracle), ids, images=grids or None)
    assert torch.equal(ours(ids, grids), expected[:, 0])


def test_rows_with_padding(qwen25, qwen3):
    """A padded batch: each row as if it were alone; what stands on padding is nobody's business."""
    rows = list(ROWS.values())
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [TEXT] * (longest - len(r)) for r, _ in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _ in rows])
    for model in (qwen25, qwen3):
        expected = theirs(model, ids, images=[g for _, grids in rows for g in grids], attention_mask=mask)
        for i, (row_ids, grids) in enumerate(rows):
            assert torch.equal(ours(row_ids, grids), expected[:, i, : len(row_ids)])


def test_a_video_of_frames_behind_timestamps_is_as_in_qwen3(qwen3):
    ids, grids = row(4, (VIDEO, 4, 6), 3, (VIDEO, 4, 6), 3, (VIDEO, 4, 6), 2, (IMAGE, 2, 4), 5)
    expected = theirs(qwen3, ids, images=[(1, 2, 4)], videos=[(3, 4, 6)])
    assert torch.equal(ours(ids, grids), expected[:, 0])


def test_one_axis_or_base_off_is_noticed(qwen3):
    """What the equality rests on: h before w, and text going on behind the longer side."""
    ids, grids = row(3, (IMAGE, 4, 8), 2)
    expected, got = theirs(qwen3, ids, images=grids)[:, 0], ours(ids, grids)
    assert not torch.equal(got[[0, 2, 1]], expected)
    assert got[0, -2] == 3 + max(4, 8) // 2 == expected[0, -2]


def test_a_video_of_qwen25_scales_time_and_ours_does_not(qwen25):
    """Three frames of 4 x 8 patches, a second apart, in one block: theirs; as three pictures in a row: ours."""
    ids, grids = row(5, (VIDEO, 4, 8), (VIDEO, 4, 8), (VIDEO, 4, 8), 2)
    per_second = qwen25.config.vision_config.tokens_per_second
    expected = theirs(qwen25, ids, videos=[(3, 4, 8)], second_per_grid_ts=torch.tensor([1.0]))[:, 0]
    got = ours(ids, grids)
    frame = torch.arange(3).repeat_interleave(8)  # of each video token
    step = max(4, 8) // 2  # by which our frames follow each other
    video = slice(5, 5 + 24)
    assert torch.equal(got[:, :5], expected[:, :5])
    assert torch.equal(expected[0, video], 5 + frame * per_second)  # absolute time
    assert torch.equal(got[0, video], 5 + frame * step)
    assert torch.equal(got[1:, video], expected[1:, video] + frame * step)  # theirs lie on top of each other
    assert expected[0, -2] == 5 + step  # behind one frame, although t has reached 5 + 2 * per_second
    assert got[0, -2] == 5 + 3 * step


def test_pictures_side_by_side_are_told_apart_by_their_grids():
    """No oracle can: theirs sees one run of picture tokens. Ours equals two rows put together."""
    ids, grids = row(2, (IMAGE, 4, 4), (IMAGE, 2, 6), 3)
    first, second = row(2, (IMAGE, 4, 4)), row((IMAGE, 2, 6), 3)
    head = mrope_positions(*first, IMAGE, VIDEO)
    tail = mrope_positions(*second, IMAGE, VIDEO) + 2 + 2
    assert np.array_equal(mrope_positions(ids, grids, IMAGE, VIDEO), np.concatenate([head, tail], axis=1))
