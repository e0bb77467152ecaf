"""The vision encoder against transformers' PaddleOCR-VL tower (eager): outputs and every gradient.

The same design, and these are under test both together and one by one: patch embedding (a convolution there, a matrix product
here), learned positions interpolated to each grid (four gathered neighbours there, `interpolate` here), 2D rotary angles,
attention inside a frame only, layers, names. Not the same:
- `packing_position_embedding` is Keye's alone; it is never read, and has no gradient.
- A clip of t frames is one entry (t, h, w) there, t entries here; the outputs are equal.
- The projector normalises elsewhere: test_projector.py.
fp32, relative norms by tensor: measured 5e-7 on outputs and 3e-6 on gradients (sums in another order); bound 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_keye.model.names import released_tensors
from tests.megatron_keye.parity.compare import assert_near, error, generator, released_gradients
from tests.megatron_keye.parity.paddle import UNUSED, config, oracles, our_tower, patches_of, with_time

TOLERANCE = 1e-5
GRIDS = {  # patches down, across; the learned grid is 27 x 27
    "small": [[4, 6]],
    "smallest": [[2, 2]],
    "not square, above 27 one way": [[2, 40], [36, 4]],
    "above 27 both ways": [[30, 34]],
    "the learned size but for one": [[26, 28]],
    "several, some alike": [[4, 6], [2, 2], [4, 6], [6, 4], [28, 2]],
}


@pytest.fixture(scope="module")
def towers():
    cfg = config()
    ours, (theirs, _) = our_tower(cfg), oracles(cfg)
    weights = {n.removeprefix("visual."): t for n, t in released_tensors(ours, cfg) if n.startswith("visual.")}
    del weights[UNUSED.removeprefix("visual.")]
    theirs.load_state_dict(weights)  # strict: every name of theirs is one of ours
    return ours, theirs


def both(towers, grid: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> ours and theirs: the output, the gradient of the pixels, and those of all weights"""
    ours, theirs = towers
    pixels, results = patches_of(grid), []
    for is_ours in (True, False):
        leaf = pixels.clone().requires_grad_()
        ours.zero_grad()
        theirs.zero_grad()
        if is_ours:
            out = ours.vision_model(leaf, grid)
        else:
            out = theirs(leaf[None], grid_thw=with_time(grid)).last_hidden_state
        out.backward(torch.randn(out.shape, generator=generator(6)))
        if is_ours:
            gradients = released_gradients([ours], config())
        else:
            gradients = {f"visual.{n}": p.grad for n, p in theirs.named_parameters()}
        results.append({"output": out.detach(), "pixels": leaf.grad, **gradients})
    return results[0], results[1]


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_and_every_gradient(name: str, towers):
    ours, theirs = both(towers, torch.tensor(GRIDS[name]))
    assert UNUSED not in ours
    assert_near(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("name", GRIDS)
def test_interpolated_positions(name: str, towers):
    """Both take the two nearest learned places each way, also when they shrink: no antialiasing.

    A coordinate near 26 has an fp32 rounding of 2e-6, and so have the weights of its two neighbours, which are up to 4.
    """
    ours, theirs = towers
    grid = torch.tensor(GRIDS[name])
    nothing = torch.zeros(1, int(grid.prod(-1).sum()), 3, 14, 14)
    with torch.no_grad():
        bias = theirs.vision_model.embeddings.patch_embedding.bias
        expected = theirs.vision_model.embeddings(nothing, grid_thw=with_time(grid)) - bias
        torch.testing.assert_close(ours.vision_model.positions(grid), expected, rtol=0, atol=2e-5)


def test_rotary_angles(towers):
    """Rows first, then columns, then both again; compared bit by bit."""
    ours, theirs = towers
    grid = torch.tensor(GRIDS["several, some alike"])
    angles = ours.vision_model.rotary(grid)
    ids = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grid.tolist()])
    cos, sin = theirs.vision_model.encoder.rotary_pos_emb(angles, ids)
    assert torch.equal(angles.cos(), cos)
    assert torch.equal(angles.sin(), sin)


@torch.no_grad()
def test_a_clip_is_its_frames(towers):
    ours, theirs = towers
    frames = torch.tensor([[4, 6]] * 3)
    pixels = patches_of(frames)
    clip = theirs(pixels[None], grid_thw=torch.tensor([[3, 4, 6]])).last_hidden_state
    assert error(ours.vision_model(pixels, frames), clip) < TOLERANCE


@torch.no_grad()
def test_what_the_comparison_notices(towers):
    """Rows and columns exchanged; one weight of many changed; frames that see each other."""
    ours, theirs = towers
    grid = torch.tensor([[4, 6], [6, 4]])
    pixels = patches_of(grid)
    expected = theirs(pixels[None], grid_thw=with_time(grid)).last_hidden_state
    assert error(ours.vision_model(pixels, grid.flip(1)), expected) > 1e-2
    assert error(ours.vision_model(pixels, torch.tensor([[12, 4]])), expected) > 1e-2
    weight = ours.vision_model.encoder.layers[1].mlp.linear_fc1.weight
    before = weight[3, 5].clone()
    weight[3, 5] += 0.1
    changed = error(ours.vision_model(pixels, grid), expected)
    weight[3, 5] = before
    assert changed > 10 * TOLERANCE
    assert error(ours.vision_model(pixels, grid), expected) < TOLERANCE
