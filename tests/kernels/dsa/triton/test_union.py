"""Words, unions and index lists against sets written out in Python; all of it is integers, so everything is exact."""

from __future__ import annotations

import pytest
import torch

from keye_kernels.dsa.triton_backend import union as U
from keye_kernels.dsa.triton_backend.blocks import BLOCK, Chunk, block_windows, chunks_of

LAYOUTS = ["causal", "tail", "packed", "more-queries", "ragged"]
NAN_ORDER, ALL = 2**31 - 1, -(2**31)


@pytest.fixture(autouse=True)
def _garbage_in_new_memory():
    """torch.empty gives NaN and the greatest integers instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def order(score: float) -> int:
    """The integer that ranks a score, by struct rather than by the kernel's arithmetic."""
    bits = torch.tensor(0.0 if score == 0 else score, dtype=torch.float32).view(torch.int32).item()
    return NAN_ORDER if score != score else bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1


def random_case(layout, name, seed=0):
    """Ranges, and the keys that each row chooses: some rows none, some all."""
    num_queries, num_keys, start, stop = layout(name)
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(num_queries, 1, generator=generator) ** 2
    density[2::7], density[3::7] = 0.0, 1.0
    s = torch.arange(num_keys)
    visible = (s >= start[:, None]) & (s < stop[:, None])
    return start, stop, visible & (torch.rand(num_queries, num_keys, generator=generator) < density)


def words_by_hand(chosen, chunk):
    """{(block, key): word} of the words that are not 0."""
    made: dict[tuple[int, int], int] = {}
    for t, s in chosen[chunk.rows].nonzero().tolist():
        key = (t // BLOCK, s)
        made[key] = made.get(key, 0) | 1 << t % BLOCK
    return made


def check_words(made, counts, windows, chunk, want):
    assert made.dtype == torch.int16
    assert made.shape == (chunk.num_blocks, chunk.width)
    assert counts.shape == (chunk.num_blocks, -(-chunk.width // U.SEGMENT))
    first = chunk.rows.start // BLOCK
    for block in range(chunk.num_blocks):
        low, high = windows[:, first + block].tolist()
        inside = made[block, low - chunk.keys.start : high - chunk.keys.start] if high else made[block, :0]
        got = {(block, low + i): int(word) & 0xFFFF for i, word in enumerate(inside.tolist()) if word}
        assert got == {key: word for key, word in want.items() if key[0] == block}
        columns = torch.tensor([key[1] - chunk.keys.start for key in got], dtype=torch.long)
        assert torch.equal(counts[block].cpu().long(), torch.bincount(columns // U.SEGMENT, minlength=counts.shape[1]))


def check_union(got, want, chunk):
    pairs = sorted(want)
    sizes = [sum(block == b for block, _ in pairs) for b in range(chunk.num_blocks)]
    assert got.start.diff().tolist() == sizes
    assert got.start[0] == 0
    assert got.widest == max(sizes)
    assert got.keys.tolist() == [key for _, key in pairs]
    assert [word & 0xFFFF for word in got.words.tolist()] == [want[pair] for pair in pairs]
    assert (got.start.dtype, got.keys.dtype, got.words.dtype) == (torch.int32, torch.int32, torch.int16)


def lists(chosen, topk):
    rows = [row.nonzero()[:, 0].tolist() for row in chosen]
    return torch.tensor([keys + [-1] * (topk - len(keys)) for keys in rows], dtype=torch.int32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_words_of_scores(name, layout, device):
    """Rows with all kinds of thresholds: everything, nothing, above NaN, ties cut in the middle; unseen scores are NaN."""
    start, stop, _ = random_case(layout, name)
    num_queries, num_keys = len(start), int(stop.max())
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-2, 3, (num_queries, num_keys), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -0.0
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = torch.nan
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = -torch.inf
    levels = [ALL, NAN_ORDER] + [order(x) for x in (torch.inf, 1.0, 0.0, -0.0, -1.0, -torch.inf)]
    tau = torch.tensor([levels[t % len(levels)] for t in range(num_queries)], dtype=torch.int32)
    cut = torch.randint(-1, num_keys, (num_queries,), generator=generator, dtype=torch.int32)
    s = torch.arange(num_keys)
    orders = torch.tensor([[order(x) for x in row] for row in scores.tolist()])
    visible = (s >= start[:, None]) & (s < stop[:, None])
    chosen = visible & ((orders > tau[:, None]) | ((orders == tau[:, None]) & (s <= cut[:, None])))
    scores[~visible] = torch.nan
    windows = block_windows(start, stop)
    for chunk in chunks_of(windows, num_queries, 1500):
        logits = scores[chunk.rows, chunk.keys].contiguous()
        arguments = [x.to(device) for x in (logits, tau[chunk.rows], cut[chunk.rows], start, stop, windows)]
        made, counts = U.words(*arguments, chunk)  # type: ignore[call-arg]
        check_words(made, counts, windows, chunk, words_by_hand(chosen, chunk))


@pytest.mark.parametrize("name", LAYOUTS)
def test_indices_there_and_back(name, layout, device):
    """List -> words -> union and list, in several chunks: each result equals the sets it came from."""
    chosen = random_case(layout, name)[2]
    topk = int(chosen.sum(-1).max()) + 3
    indices = lists(chosen, topk)
    shuffled = torch.stack([row[torch.randperm(topk, generator=torch.Generator().manual_seed(5))] for row in indices])
    windows = U.index_windows(shuffled)
    back = torch.full(indices.shape, -1, dtype=torch.int32, device=device)
    for chunk in chunks_of(windows, len(indices), 1500):
        want = words_by_hand(chosen, chunk)
        made, counts = U.words_of_indices(shuffled.to(device), windows.to(device), chunk)
        check_words(made, counts, windows, chunk, want)
        check_union(U.union(made, counts, windows.to(device), chunk), want, chunk)
        back[chunk.rows] = 7  # garbage to be overwritten, -1 tails included
        U.write_indices(made, windows.to(device), chunk, back)
    assert torch.equal(back.cpu(), indices)


def test_index_windows():
    indices = torch.full((35, 3), -1, dtype=torch.int32)
    indices[0, 1], indices[15, 2], indices[34] = 9, 4, torch.tensor([0, -1, 0])
    assert U.index_windows(indices).tolist() == [[4, 0, 0], [10, 0, 1]]
    assert U.index_windows(torch.empty(5, 0, dtype=torch.int32)).tolist() == [[0], [0]]


def test_wider_than_a_segment_and_outside_the_window(device):
    """Keys in several segments, a block whose window is a part of the chunk's, and one that sees nothing."""
    indices = torch.full((48, 4), -1, dtype=torch.int32)
    indices[0] = torch.tensor([100, 611, 612, 2003])
    indices[15] = torch.tensor([2003, 101, -1, 100])
    indices[40] = torch.tensor([1500, -1, -1, 1501])
    windows = U.index_windows(indices)
    (chunk,) = chunks_of(windows, 48)
    assert chunk.keys == slice(100, 2004)
    made, counts = U.words_of_indices(indices.to(device), windows.to(device), chunk)
    made[0, :0], made[1], made[2, :1400], made[2, 1402:] = 0, 21, 21, 21  # garbage outside the windows
    got = U.union(made, counts, windows.to(device), chunk)
    assert got.start.tolist() == [0, 5, 5, 7]
    assert got.keys.tolist() == [100, 101, 611, 612, 2003, 1500, 1501]
    both, last = 1 | 1 << 15, 1 << 15
    assert [word & 0xFFFF for word in got.words.tolist()] == [both, last, 1, 1, both, 1 << 8, 1 << 8]
    assert got.widest == 5
    listed = torch.full((48, 4), 7, dtype=torch.int32, device=device)
    U.write_indices(made, windows.to(device), chunk, listed)
    assert listed[[0, 15, 20, 40]].tolist() == [
        [100, 611, 612, 2003], [100, 101, 2003, -1], [-1] * 4, [1500, 1501, -1, -1],
    ]  # fmt: skip


def test_nothing_chosen(device):
    """A chunk whose rows see keys but list none: an empty union, not an error."""
    chunk, windows = Chunk(slice(0, 5), slice(3, 40)), torch.tensor([[3], [40]], dtype=torch.int32, device=device)
    indices = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    got = U.union(*U.words_of_indices(indices, windows, chunk), windows, chunk)
    assert (got.start.tolist(), got.keys.numel(), got.words.numel(), got.widest) == ([0, 0], 0, 0, 0)
