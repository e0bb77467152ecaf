"""The K greatest of every row against a stable sort, exactly: on each path that a row can take, and on scores made to hurt."""

from __future__ import annotations

import importlib

import pytest
import torch

from keye_kernels.dsa import reference
from keye_kernels.dsa.triton_backend.blocks import BLOCK, Chunk, block_windows, chunks_of
from keye_kernels.dsa.triton_backend.union import words, write_indices

M = importlib.import_module("keye_kernels.dsa.triton_backend.thresholds")  # the package has a function of this name
DONE, OPEN = 0, 1


@pytest.fixture(autouse=True)
def _garbage_in_new_memory():
    """torch.empty gives NaN and the greatest integers instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch):
    """Rows of a few hundred scores take the way of rows of a hundred thousand, in several steps."""
    monkeypatch.setattr(importlib.import_module("keye_kernels.dsa.triton_backend.radix"), "TILE", 128)
    monkeypatch.setattr(M, "DEEP", 1)
    monkeypatch.setattr(M, "HELD", 256)
    monkeypatch.setattr(M, "sample_of", lambda width: 256)
    monkeypatch.setattr(M, "room", lambda width, topk: 256)


def by_sort(scores, start, stop, topk):
    """int32 [T,K] by a stable sort of (broken first, -score, key), in Python."""
    rows = []
    for t, row in enumerate(scores.tolist()):
        best = sorted(
            range(int(start[t]), int(stop[t])), key=lambda s: (row[s] == row[s], -row[s] if row[s] == row[s] else 0)
        )
        best = sorted(best[:topk])
        rows.append(best + [-1] * (topk - len(best)))
    return torch.tensor(rows, dtype=torch.int32)


def selected(scores, start, stop, topk, device, pairs=10**9):
    """-> int32 [T,K] by thresholds, words and write_indices, chunk by chunk; what no row sees is NaN."""
    visible = reference.range_mask(start, stop, scores.shape[1])
    hidden = torch.where(visible, scores, torch.nan)
    windows = block_windows(start, stop)
    start, stop, on_device = start.to(device), stop.to(device), windows.to(device)
    indices = torch.full((len(scores), topk), -1, dtype=torch.int32, device=device)
    for chunk in chunks_of(windows, len(scores), pairs):
        logits = hidden[chunk.rows, chunk.keys].contiguous().to(device)
        tau, cut = M.thresholds(logits, start, stop, chunk, topk)
        assert (tau.dtype, cut.dtype, tau.shape, cut.shape) == (torch.int32, torch.int32, *[(chunk.num_rows,)] * 2)
        made, _ = words(logits, tau, cut, start, stop, on_device, chunk)
        write_indices(made, on_device, chunk, indices)
    return indices.cpu()


def paths(scores, device, topk):
    """Which rows the first kernel left open, when they see everything."""
    start, stop = whole(scores)
    chunk = Chunk(slice(0, len(scores)), slice(0, scores.shape[1]))
    return M.bracket(scores.to(device), start.to(device), stop.to(device), chunk, topk)[2].tolist()


def whole(scores) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, num_keys = scores.shape
    return torch.zeros(num_queries, dtype=torch.int32), torch.full((num_queries,), num_keys, dtype=torch.int32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "topk"),
    [("causal", 12), ("tail", 12), ("packed", 3), ("more-queries", 30), ("ragged", 1), ("ragged", 12), ("ragged", 300)],
)
def test_short_rows(name, topk, layout, device):
    """Few levels, so that the K-th is a tie in most rows, signs of zero mixed; several chunks, windows not from 0."""
    num_queries, num_keys, start, stop = layout(name)
    scores = (normal(num_queries, num_keys) * 2).round()
    scores[normal(num_queries, num_keys, seed=1) > 1] *= -1
    assert torch.equal(selected(scores, start, stop, topk, device, 2500), by_sort(scores, start, stop, topk))


def test_as_many_as_visible_and_one_off(device):
    """K equal to the number of visible keys, one more, one less, and none visible."""
    start = torch.tensor([0, 3, 3, 3, 8, 0], dtype=torch.int32)
    stop = torch.tensor([16, 12, 13, 14, 8, 10], dtype=torch.int32)
    scores = normal(6, 16)
    scores[5] = 2.5
    got = selected(scores, start, stop, 10, device)
    assert torch.equal(got, by_sort(scores, start, stop, 10))
    assert (got >= 0).sum(-1).tolist() == [10, 9, 10, 10, 0, 10]


HARD = {
    "normal": lambda n: normal(n),
    "all equal": lambda n: torch.full((n,), -0.25),
    "zeros of both signs": lambda n: torch.where(normal(n) > 0, 0.0, -0.0),
    "plateau at 0": lambda n: normal(n).relu() * (normal(n, seed=3) > 1) * normal(n, seed=4).sign(),
    "two levels": lambda n: (normal(n) > 1).float(),
    "infinities": lambda n: torch.where(normal(n).abs() < 0.5, normal(n, seed=2).sign() * torch.inf, normal(n)),
    "NaN": lambda n: torch.where(normal(n).abs() < 0.05, torch.nan, normal(n, seed=2)),
    "all NaN": lambda n: torch.full((n,), torch.nan),
    "NaN of both signs": lambda n: torch.where(normal(n) > 0, torch.nan, -torch.tensor(torch.nan)),
    "subnormal": lambda n: normal(n) * 1e-42,
    "huge": lambda n: normal(n) * 1e38,
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "negative": lambda n: -normal(n).abs() - 1e-3,
    "one in a million": lambda n: 1 + torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(6)) * 2.0**-23,
}


@pytest.mark.parametrize("topk", [1, 40, 255])
def test_long_rows(topk, small, device):
    """Each kind of hard scores in a row of its own, longer than what is held at once, odd in length and at odd places."""
    scores = torch.stack([make(701) for make in HARD.values()])
    start = torch.arange(len(HARD), dtype=torch.int32) * 3 % 7
    stop = 701 - torch.arange(len(HARD), dtype=torch.int32) * 5 % 11
    got, want = selected(scores, start, stop, topk, device), by_sort(scores, start, stop, topk)
    for number, name in enumerate(HARD):
        assert torch.equal(got[number], want[number]), name


def test_which_path(small, device):
    """Distinct scores are done after one read; a plateau without room, or a sample that lies, leaves the row open."""
    scores = normal(4, 600)
    scores[1] = (normal(600) - 0.6).relu()  # most of it 0.0, and the K-th among them
    scores[2, scores[2] > 0.1] += 7.0  # a wide gap is no trouble
    number = torch.arange(256)
    sampled = (number * 256 + (number * 40503 >> 8 & 255)) * 600 // (256 * 256)
    scores[3] = normal(600, seed=9).abs() + 10
    scores[3, sampled] = -1.0 - torch.rand(256, generator=torch.Generator().manual_seed(2))
    assert paths(scores, device, 300) == [DONE, OPEN, DONE, OPEN]
    assert torch.equal(selected(scores, *whole(scores), 300, device), by_sort(scores, *whole(scores), 300))


@pytest.mark.parametrize("topk", [295, 305])
def test_edge_of_a_plateau(topk, small, device):
    """The K-th is five places before or behind the edge of 300 equal scores, which are one end of the bracket: it equals
    that end in one row, lies beside it in the other."""
    rank = torch.randperm(600, generator=torch.Generator().manual_seed(8))
    scores = torch.stack((300.0 - rank, 299.0 - rank)).float()
    scores = torch.stack((scores[0].clamp(min=0), scores[1].clamp(max=0)))  # 300 above a plateau, 300 below one
    assert [int((scores[0] > 0).sum()), int((scores[1] < 0).sum())] == [300, 300]
    assert paths(scores, device, topk) == [OPEN, OPEN]
    assert torch.equal(selected(scores, *whole(scores), topk, device), by_sort(scores, *whole(scores), topk))


def test_no_room_for_the_candidates(small, device, monkeypatch):
    """A bracket that holds more than there is room for: nothing is written beyond, and the whole row is searched."""
    monkeypatch.setattr(M, "room", lambda width, topk: 16)
    scores = normal(5, 333)
    assert paths(scores, device, 100) == [OPEN] * 5
    assert torch.equal(selected(scores, *whole(scores), 100, device), by_sort(scores, *whole(scores), 100))


def test_rows_in_several_launches(small, device, monkeypatch):
    monkeypatch.setattr(M, "SCRATCH", 256 * 3)  # three rows at a time
    scores = normal(BLOCK + 1, 300)
    assert torch.equal(selected(scores, *whole(scores), 33, device), by_sort(scores, *whole(scores), 33))


def test_real_sizes(device):
    """Unpatched: rows above 8192 scores, causal ends, K as in Keye, in one chunk with short rows."""
    num_keys, topk = 20011, 2048
    stop = torch.tensor([num_keys, 19000, 9000, 8192, 4100, 2049, 2048, 100], dtype=torch.int32)
    start = torch.tensor([0, 77, 13, 0, 5, 0, 0, 99], dtype=torch.int32)
    scores = normal(8, num_keys).relu() - 0.1 * normal(8, num_keys, seed=1).relu()
    assert M.room(num_keys, topk) < 8192
    assert paths(scores[:3], device, topk) == [DONE] * 3
    want = reference_indices(scores, start, stop, topk)
    assert torch.equal(selected(scores, start, stop, topk, device), want)


def reference_indices(scores, start, stop, topk):
    visible = reference.range_mask(start, stop, scores.shape[1])
    order = scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    order = torch.where(visible.gather(1, order), order, scores.shape[1]).sort(-1).values
    return torch.where(order == scores.shape[1], -1, order).int()


@pytest.mark.parametrize("width", [8193, 16384, 131072, 262144, 2**20])
def test_room_for_a_bracket(width):
    """What is set aside is well above what a bracket holds on average, at every length."""
    for topk in (7, 512, 2048):
        share = topk / width
        places = 5 * (M.sample_of(width) * share * (1 - share)) ** 0.5  # to either side, of the sample
        below = min(places, M.sample_of(width) * share)
        assert M.room(width, topk) >= 1.3 * (places + below) / M.sample_of(width) * width
    assert M.room(8192, 2048) == 8192
    assert M.room(5, 2048) == 16
