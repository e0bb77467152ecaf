"""The loader: coverage, exact resume, disjoint ranks, and broken data that must not stop it."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

import keye_data.loader
from keye_data.errors import DataError
from keye_data.loader import Loader
from keye_data.sample import IGNORE, Batch
from keye_data.settings import ImageConfig, SourceConfig
from keye_data.shards import build_shards
from tests.data.loading import same

LENGTH = 160


def answer(*parts: dict, text: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "Say it."}]},
            {"role": "assistant", "content": text},
        ]
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_picture, make_clip) -> dict[str, Path]:
    """Shard folders: 24 documents, 10 pictures, 6 clips; small shards, so that readers share them."""
    root = tmp_path_factory.mktemp("sources")
    records: dict[str, list[dict]] = {
        "text": [{"text": f"Document {i}. " + "word " * (5 + 7 * i % 40)} for i in range(24)]
    }
    for i in range(10):
        (root / f"{i}.png").write_bytes(make_picture(56, 28 * (2 + i % 3), seed=i))
    records["image"] = [answer({"type": "image", "image": f"{i}.png"}, text=f"picture {i}") for i in range(10)]
    for i in range(6):
        (root / f"{i}.mp4").write_bytes(make_clip(6 + i, seed=i))
    records["video"] = [answer({"type": "video", "video": f"{i}.mp4"}, text=f"clip {i}") for i in range(6)]
    built = {}
    for name, items in records.items():
        source = root / f"{name}.jsonl"
        source.write_text("".join(json.dumps(item) + "\n" for item in items))
        build_shards(source, root / name, samples_per_shard=4)
        built[name] = root / name
    return built


@pytest.fixture
def make_loader(open_loader, folders):
    numbers = {"seq_length": LENGTH, "packing_buffer": 6, "shuffle_buffer": 5, "micro_batch_size": 2, "seed": 1}

    def make(*names, paths=(), weights=(1.0,) * 9, **changes) -> Loader:
        paths = [*(folders[name] for name in names), *paths]
        sources = [SourceConfig(str(path), weight) for path, weight in zip(paths, weights)]
        return open_loader(*sources, image=ImageConfig(4, 16), **{**numbers, **changes})

    return make


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def test_batches_are_whole(make_loader):
    batches = take(make_loader("text", "image", "video"), 8)
    for batch in batches:
        assert batch.input_ids.shape == batch.targets.shape == batch.key_start.shape == (2, LENGTH)
        assert batch.position_ids.shape == (3, 2, LENGTH) and batch.key_stop.dtype == torch.int32
        pads = ((batch.input_ids == 151655) | (batch.input_ids == 151656)).sum()
        assert batch.patches.shape[0] == 4 * pads == batch.grid.prod(1).sum()
        assert len(batch.keys) == len(batch.sources) > 0 and (batch.targets != IGNORE).any()
        assert batch.skipped == {} and batch.decode_ms >= 0
    assert {Path(source).name for batch in batches for source in batch.sources} == {"text", "image", "video"}
    assert sum(int(batch.patches.float().std() > 0) for batch in batches) > 4


def test_an_epoch_holds_every_sample_once_and_epochs_repeat(make_loader):
    loader = make_loader("text", packing=False, micro_batch_size=1, shuffle_buffer=1)
    keys = [batch.keys[0] for batch in take(loader, 72)]
    for epoch in range(3):
        assert len(set(keys[24 * epoch : 24 * epoch + 24])) == 24
    assert keys[:24] != keys[24:48]


def test_weights(make_loader):
    loader = make_loader("text", "image", weights=(4.0, 1.0), packing=False, micro_batch_size=1)
    names = [Path(batch.sources[0]).name for batch in take(loader, 200)]
    assert 140 < names.count("text") < 180  # 160 expected


def test_seed_changes_the_order_and_only_the_seed(make_loader):
    first, again, other = (take(make_loader("text", "image", seed=seed), 4) for seed in (1, 1, 2))
    assert same(first, again) and [b.keys for b in first] != [b.keys for b in other]


@pytest.mark.parametrize(("workers", "stop"), [(0, 0), (0, 7), (1, 0), (1, 7), (2, 5)])
def test_resume_is_exact(make_loader, workers, stop):
    names = ("text", "image", "video")
    loader = make_loader(*names, workers=workers)
    take(loader, stop)
    state = loader.state_dict()
    want = take(loader, 9)
    file = io.BytesIO()
    torch.save(state, file)  # as a checkpoint holds it, and no class may be needed to read it
    resumed = make_loader(*names, workers=workers)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    got = take(resumed, 1)
    second = resumed.state_dict()  # taken before every worker has delivered again
    assert same(got + take(resumed, 8), want)
    third = make_loader(*names, workers=workers)
    third.load_state_dict(second)
    assert same(take(third, 8), want[1:])


@pytest.mark.parametrize(("workers", "stop"), [(1, 3), (1, 6), (2, 9)])
def test_resume_is_exact_from_checkpoints_inside_the_workers(make_loader, monkeypatch, workers, stop):
    # Energon's workers keep a state every minute, and skip from there; here with every batch, so full buffers are restored.
    often = partial(keye_data.loader.get_savable_loader, checkpoint_every_sec=0, checkpoint_every_min_n_samples=1)
    monkeypatch.setattr(keye_data.loader, "get_savable_loader", often)
    loader = make_loader("text", "image", "video", workers=workers)
    take(loader, stop)
    state = loader.state_dict()
    assert str(state["energon"]).count("'Webdataset'") > 5  # it does hold pointers to buffered samples
    want = take(loader, 6)
    resumed = make_loader("text", "image", "video", workers=workers)
    resumed.load_state_dict(state)
    assert same(take(resumed, 6), want)


def test_ranks_are_disjoint_and_together_whole(make_loader):
    keys = []
    for rank in range(2):
        loader = make_loader("text", rank=rank, world_size=2, packing=False, micro_batch_size=1, shuffle_buffer=1)
        keys.append({batch.keys[0] for batch in take(loader, 12)})
    assert len(keys[0]) == len(keys[1]) == 12 and not keys[0] & keys[1]


def test_another_number_of_ranks_goes_on_where_readers_stay_the_same(make_loader):
    two = [make_loader("text", "image", rank=rank, world_size=2, workers=1) for rank in range(2)]
    for loader in two:
        take(loader, 3)
    states = [loader.state_dict() for loader in two]
    rest = [take(loader, 4) for loader in two]
    one = make_loader("text", "image", workers=2)
    one.load_state_dict(states)
    got = take(one, 8)
    assert same(got[0::2], rest[0]) and same(got[1::2], rest[1])


def test_resume_refuses_what_cannot_be_exact(make_loader):
    state = make_loader("text", workers=1, world_size=2).state_dict()
    with pytest.raises(DataError, match=r"2 data-parallel ranks x 1 workers; on 1 ranks set data.workers=2, not 1"):
        make_loader("text", workers=1).load_state_dict(state)
    with pytest.raises(DataError, match="divides 2"):
        make_loader("text", workers=1, world_size=3).load_state_dict(state)
    with pytest.raises(DataError, match="seed 1, this run has 5"):
        make_loader("text", workers=1, world_size=2, seed=5).load_state_dict(state)
    with pytest.raises(DataError, match="no loader state of data-parallel rank 1"):
        make_loader("text", workers=1, world_size=2, rank=1).load_state_dict(state)
    with pytest.raises(DataError, match="version None"):
        make_loader("text").load_state_dict({})
    with pytest.raises(DataError, match="holds no loader state"):
        make_loader("text").load_state_dict([])
    started = make_loader("text")
    next(started)
    with pytest.raises(DataError, match="before the first batch"):
        started.load_state_dict(started.state_dict())


def write_shards(folder: Path, records: list[dict], files: dict[str, bytes], samples_per_shard: int = 4) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_shards(folder, folder / "shards", samples_per_shard)
    return folder / "shards"


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_skipped_counted_and_named(make_loader, make_clip, make_picture, tmp_path, caplog, workers):
    clip, picture = make_clip(8), make_picture(56, 56, format="JPEG")
    files = {"good.mp4": clip, "cut.mp4": clip[: len(clip) // 2], "cut.jpg": picture[:300], "junk.png": b"junk"}
    records = [answer({"type": "video", "video": "good.mp4"}, text="good")] * 3
    records += [answer({"type": "video", "video": "cut.mp4"}, text="bad")]
    records += [answer({"type": "image", "image": name}, text="bad") for name in ("cut.jpg", "junk.png")]
    records += [{"text": "long " * 2 * LENGTH}]
    path = write_shards(tmp_path / "in", records, files)
    with caplog.at_level(logging.WARNING):
        batches = take(make_loader(paths=[path], workers=workers, packing=False, micro_batch_size=1), 12)
    total: dict[str, int] = {}
    for batch in batches:
        for reason, count in batch.skipped.items():
            total[reason] = total.get(reason, 0) + count
    assert set(total) == {"corrupt clip", "undecodable picture", "too long"}
    assert total["undecodable picture"] > total["too long"] >= 2
    assert {key.rsplit("/", 1)[1] for batch in batches for key in batch.keys} == {"000000000", "000000001", "000000002"}
    for key in ("000000003: 0.mp4", "000000004: 0.jpg", "000000005: 0.png", "000000006: 322 tokens"):
        assert f"{path}/shard-00000{int(key[8]) // 4}.tar/{key}" in caplog.text


def test_a_clip_that_breaks_at_decoding_is_masked(make_loader, caplog, monkeypatch):
    loader = make_loader("video", packing=True)
    whole = next(make_loader("video", packing=True))
    pixels, calls = loader.processor.pixels, []

    def sometimes(media):
        calls.append(media)
        if len(calls) == 1:
            raise DataError("a video: bad packet", "corrupt clip")
        return pixels(media)

    monkeypatch.setattr(loader.processor, "pixels", sometimes)
    batch = next(loader)
    assert batch.skipped == {"corrupt clip": 1} and batch.keys[0] in caplog.text
    assert torch.equal(batch.input_ids, whole.input_ids) and torch.equal(batch.grid, whole.grid)
    own = (batch.key_start[0] == 0) & (batch.key_stop[0] > 0)  # the first document of the first row
    assert (batch.targets[0][own] == IGNORE).all() and (whole.targets[0][own] != IGNORE).any()
    assert torch.equal(batch.targets[0][~own], whole.targets[0][~own])
    first = int(((whole.input_ids[0] == 151656) & own).sum()) * 4
    assert (batch.patches[:first] == 0).all() and torch.equal(batch.patches[first:], whole.patches[first:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_tar_does_not_stop_the_run(make_loader, tmp_path, caplog, workers):
    path = write_shards(tmp_path / "in", [{"text": f"Document {i} " * 9} for i in range(12)], {}, samples_per_shard=6)
    tar = path / "shard-000001.tar"
    with tarfile.open(tar) as opened:
        cut = opened.getmembers()[3]
    tar.write_bytes(tar.read_bytes()[: cut.offset_data + 20])
    with caplog.at_level(logging.WARNING):
        loader = make_loader(paths=[path], workers=workers, packing=False, micro_batch_size=1, shuffle_buffer=1)
        batches = take(loader, 18)
    assert {key.rsplit("/", 1)[1] for batch in batches for key in batch.keys} == {f"{i:09d}" for i in range(9)}
    assert sum(batch.skipped.get("unreadable shard", 0) for batch in batches) >= 3
    assert f"{tar}/sample 9" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_in_a_row_stop_the_run(make_loader, tmp_path, workers):
    records = [answer({"type": "image", "image": "junk.png"}, text="x")] * 6
    path = write_shards(tmp_path / "in", records, {"junk.png": b"junk"})
    loader = make_loader(paths=[path], workers=workers, max_failures_in_a_row=9)
    with pytest.raises(DataError, match=r"^9 samples in a row .* the last: .*shard-00000.\.tar/.*: 0\.png.*") as error:
        next(loader)
    assert "Traceback" not in str(error.value)


def test_bad_sources_are_refused_with_the_cure(make_loader, tmp_path, folders):
    cure = "build_shards.py SOURCE --out"
    with pytest.raises(DataError, match=f"none does not exist; build it with .*{cure}"):
        make_loader(paths=[tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"no shard folder .*{cure}"):
        make_loader(paths=[tmp_path / "empty"])
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        make_loader()
    with pytest.raises(DataError, match="6 samples for 8 readers"):
        make_loader("video", world_size=4, workers=2)
    path = write_shards(tmp_path / "in", [{"text": "x"}] * 2, {}, samples_per_shard=1)
    (path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of its shards, first shard-000001\.tar"):
        make_loader(paths=[path])
