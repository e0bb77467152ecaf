"""A shard set of others' making, 5 % of whose members are bad: one epoch holds every good sample once, and names every bad one."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import tarfile
import zlib
from functools import partial
from pathlib import Path

import pytest
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

import keye_data.energon_source
from keye_data.accounting import Account
from keye_data.errors import DataError
from keye_data.settings import ImageConfig

PER_SHARD = 20


def talk(kind: str, name: str) -> bytes:
    parts = [{"type": kind, kind: name}, {"type": "text", "text": "What is it?"}]
    return json.dumps(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "That."}]}
    ).encode()


def huge_picture(side: int = 30_000) -> bytes:
    """A whole PNG of side x side black pixels, one bit each: about 0.1 MB that ask for 2.7 GB."""
    squeeze = zlib.compressobj(1)
    rows = b"".join(squeeze.compress(bytes(1 + side // 8)) for _ in range(side)) + squeeze.flush()
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


def bad_samples(clip: bytes, picture: bytes) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Why it is bad -> (reason reported, its members by suffix)."""
    film, still = talk("video", "0.mp4"), talk("image", "0.png")
    headless = {"messages": [{"content": "no role"}]}
    return {
        "truncated clip": ("corrupt clip", {"json": film, "0.mp4": clip[: len(clip) // 2]}),
        "garbage clip": ("corrupt clip", {"json": film, "0.mp4": random.Random(1).randbytes(5000)}),
        "empty clip": ("corrupt clip", {"json": film, "0.mp4": b""}),
        "picture called clip": ("corrupt clip", {"json": film, "0.mp4": picture}),
        "text called clip": ("corrupt clip", {"json": film, "0.mp4": b"#EXTM3U\nhttp://127.0.0.1/x.ts\n"}),
        "clip called picture": ("undecodable picture", {"json": still, "0.png": clip}),
        "truncated picture": ("undecodable picture", {"json": still, "0.png": picture[: len(picture) // 3]}),
        "empty picture": ("undecodable picture", {"json": still, "0.png": b""}),
        "huge picture": ("undecodable picture", {"json": still, "0.png": huge_picture()}),
        "no role": ("malformed conversation", {"json": json.dumps(headless).encode()}),
        "no messages": ("malformed conversation", {"json": b'{"id": 7}'}),
        "text is a number": ("malformed conversation", {"json": b'{"text": 7}'}),
        "cut json": ("malformed conversation", {"json": film[:40], "0.mp4": clip}),
        "no json": ("malformed conversation", {"0.mp4": clip}),
        "no media": ("missing media", {"json": film}),
        "too long": ("too long", {"json": json.dumps({"text": "word " * 400}).encode()}),
        "climbs out": ("unsafe name", {"json": b'{"text": "A sample that climbs out."}'}),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_clip, make_picture) -> tuple[Path, set[str], dict[str, str]]:
    """(folder, keys of the good samples, reason by key of the bad ones)"""
    folder = tmp_path_factory.mktemp("faulty")
    clips = [make_clip(4 + i, seed=i) for i in range(6)]
    pictures = [make_picture(56, 28 * (2 + i), seed=i) for i in range(3)]
    clip, picture = clips[4], pictures[0]
    bad = bad_samples(clip, picture)
    good: list[dict[str, bytes]] = []
    for i in range(17 * len(bad)):
        film = {"json": talk("video", "0.mp4"), "0.mp4": clips[i % 6]}
        still = {"json": talk("image", "0.png"), "0.png": pictures[i % 3]}
        text = {"json": json.dumps({"text": f"Document {i}. " + "word " * (i % 50)}).encode()}
        good.append(film if i % 5 == 0 else still if i % 5 == 1 else text)
    samples: list[tuple[str | None, dict[str, bytes]]] = [(None, members) for members in good]
    samples += [(name, members) for name, (_, members) in bad.items()]
    random.Random(0).shuffle(samples)
    members = sum(len(its) for _, its in samples)
    assert 0.045 < sum(len(its) for name, its in samples if name) / members < 0.08

    expected: tuple[set[str], dict[str, str]] = (set(), {})
    names = [f"part-{i:03d}.tar" for i in range(-(-len(samples) // PER_SHARD))]
    for number, shard in enumerate(names):
        with tarfile.open(folder / shard, "w") as tar:
            for i, (name, parts) in enumerate(samples[number * PER_SHARD : (number + 1) * PER_SHARD]):
                index = number * PER_SHARD + i
                key = f"../../{index:04d}" if name == "climbs out" else f"{index:04d}"
                for suffix, data in parts.items():
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                full = f"{folder}/{shard}/{f'sample {index}' if name == 'climbs out' else key}"
                if name:
                    expected[1][full] = bad[name][0]
                else:
                    expected[0].add(full)
    logging.getLogger("megatron.energon").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
    text = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(text)
    return folder, *expected


@pytest.fixture
def one_epoch(open_loader):
    """one_epoch(folder, ...) -> a loader that reads every sample once."""
    numbers = {"packing_buffer": 16, "shuffle_buffer": 10, "image": ImageConfig(4, 16)}
    return partial(open_loader, micro_batch_size=3, seed=5, repeat=False, **numbers)


def run(one_epoch, folder: Path, ranks: int, workers: int, **changes) -> tuple[list[str], list, Account]:
    """One epoch of all ranks: keys of the samples used, those reported, and the account."""
    batches = []
    for rank in range(ranks):
        loader = one_epoch(folder, rank=rank, world_size=ranks, workers=workers, **changes)
        batches += list(loader)
        loader.close()
    masked = {one.key for batch in batches for one in batch.bad if one.masked}
    used = [key for batch in batches for key in batch.keys if key not in masked]
    return used, [one for batch in batches for one in batch.bad], Account.of(batches)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1)])
def test_every_good_sample_once_and_every_bad_one_named(one_epoch, shards, ranks, workers):
    folder, good, bad = shards
    used, reported, account = run(one_epoch, folder, ranks, workers)
    assert sorted(used) == sorted(good)
    assert {one.key: one.reason for one in reported} == bad and len(reported) == len(bad)
    assert all(one.key in one.message and one.source == str(folder) for one in reported)
    assert account.epochs({str(folder): len(good) + len(bad)}) == {str(folder): 1.0}
    assert sum(account.reasons.values()) == len(bad)


def test_a_cut_shard_loses_its_end_only(one_epoch, shards, tmp_path):
    folder, good, bad = shards
    copy = shutil.copytree(folder, tmp_path / "copy")
    tar = copy / "part-003.tar"
    with tarfile.open(tar) as opened:
        cut = next(entry for entry in opened if entry.name.startswith("0072."))
    tar.write_bytes(tar.read_bytes()[: cut.offset_data + 10])
    used, reported, account = run(one_epoch, copy, 1, 1)
    lost = {f"{folder}/part-003.tar/{i:04d}" for i in range(72, 80)}
    assert sorted(used) == sorted(key.replace(str(folder), str(copy)) for key in good - lost)
    unreadable = {one.key for one in reported if one.reason == "unreadable shard"}
    assert unreadable == {f"{tar}/sample {i}" for i in range(72, 80)}
    assert account.epochs({str(copy): len(good) + len(bad)}) == {str(copy): 1.0}


def test_what_energon_drops_is_named_too(one_epoch, shards, monkeypatch):
    """Energon itself drops a batch that cannot be made; nothing else is lost with it."""
    folder, good, bad = shards
    first = min(good)
    collate, dropped = keye_data.energon_source.collate, []

    def collate_most(rows, *rest):
        keys = [sample.key for row in rows for sample in row]
        if first in keys:
            dropped.extend(keys)
            raise ValueError("no such batch")
        return collate(rows, *rest)

    monkeypatch.setattr(keye_data.energon_source, "collate", collate_most)
    used, reported, account = run(one_epoch, folder, 1, 0)
    assert len(dropped) > 1 and sorted(used) == sorted(good - set(dropped))
    named = {one.key: one for one in reported}
    assert set(named) == set(bad) | set(dropped) and len(reported) == len(named)
    assert all(named[key].reason == "dropped by Energon" and "no such batch" in named[key].message for key in dropped)
    assert account.epochs({str(folder): len(good) + len(bad)}) == {str(folder): 1.0}


def test_data_that_changed_under_a_checkpoint_is_refused(one_epoch, shards, tmp_path):
    """The saved buffers point to samples that can no longer be read: going on without them would be another order."""
    folder, _, _ = shards
    copy = shutil.copytree(folder, tmp_path / "copy")
    loader = one_epoch(copy)
    next(loader)
    state = loader.state_dict()
    for tar in copy.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    resumed = one_epoch(copy)
    resumed.load_state_dict(state)
    with pytest.raises(
        DataError, match=r"not what it was when the checkpoint was written; put it back as it was: .*/copy/"
    ):
        next(resumed)


def test_a_damaged_index_is_refused_before_the_first_batch(one_epoch, shards, tmp_path):
    folder, _, _ = shards
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = copy / "part-004.tar.idx"
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"part-004\.tar\.idx is missing or damaged; build it"):
        one_epoch(copy)


def test_documents_may_be_cut_instead_of_skipped(one_epoch, shards):
    folder, good, bad = shards
    used, reported, _ = run(one_epoch, folder, 1, 0, too_long="cut")
    long = {key for key, reason in bad.items() if reason == "too long"}
    assert sorted(used) == sorted(good | long)
    assert {one.key for one in reported} == set(bad) - long
