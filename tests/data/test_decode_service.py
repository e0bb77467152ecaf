"""The decode service on a real Ray of this machine: the same bits, in the same order, also when an actor dies."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import time

import pytest
import torch

from keye_data import cluster, decode_service
from keye_data.decode_service import DecodeService
from keye_data.errors import DataError
from keye_data.loader import Loader
from keye_data.pixels import decode_pixels
from keye_data.sample import Media
from keye_data.settings import DecodeServiceConfig, VideoConfig
from keye_data.shards import build_shards
from keye_data.stretch import Stretch
from keye_data.video import Part, UnsupportedCodec
from tests.data.loading import same

# ---- what is refused before anything starts


def test_settings_that_cannot_be(monkeypatch):
    for name in ("actors", "cpus_per_actor"):
        with pytest.raises(DataError, match=rf"decode_service\.{name}: 0 must be 1 or more"):
            DecodeService(DecodeServiceConfig("local", **{name: 0}), VideoConfig())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    with pytest.raises(DataError, match=r"data\.decode_service\.address=auto needs Ray, .*: pip install"):
        DecodeService(DecodeServiceConfig("auto"), VideoConfig())


def test_a_cluster_that_is_not_there_is_told_at_once():
    service = DecodeService(DecodeServiceConfig("127.0.0.1:9"), VideoConfig())
    with pytest.raises(
        DataError, match=r"data\.decode_service\.address: the Ray cluster 127\.0\.0\.1:9 cannot be reached"
    ):
        service.start(Media("video", [Part(b"", [0])], (28, 28)))
    service.close()


# ---- a cluster of this machine


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    mine = signal.getsignal(signal.SIGTERM)
    assert cluster.connect("local", 2, "the test")
    assert signal.getsignal(signal.SIGTERM) is mine  # a trainer's own, which saves first
    signal.signal(signal.SIGTERM, handler)
    assert not cluster.connect("local", 2, "the test")  # joined already
    yield ray
    ray.shutdown()


@pytest.fixture
def service(ray):
    service = DecodeService(DecodeServiceConfig("local", actors=2), VideoConfig())
    yield service
    service.close()
    assert ray.is_initialized()  # not joined by the service, so not left by it


@pytest.fixture(scope="module")
def clips(make_clip) -> list[bytes]:
    return [make_clip(8 + 4 * i, height=96, width=128, seed=i) for i in range(6)]


class Deadly(str):
    """A word that ends the process which reads it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.ray
@pytest.mark.slow  # a loader with actors of its own: 15 to 30 s
def test_the_loader_gives_the_same_batches_and_goes_on_from_the_same_places(clips, open_loader, tmp_path):
    for i, clip in enumerate(clips):
        (tmp_path / f"{i}.mp4").write_bytes(clip)
    lines = []
    for i in range(len(clips)):
        question = {"role": "user", "content": [{"type": "video", "video": f"{i}.mp4"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"clip {i}"}]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    build_shards(tmp_path / "data.jsonl", tmp_path / "shards", samples_per_shard=3)

    def make(prefetch: int, address: str | None) -> Loader:
        return open_loader(
            tmp_path / "shards",
            seq_length=256,
            workers=1,
            prefetch=prefetch,
            video=VideoConfig(min_frame_tokens=4, max_frame_tokens=8),
            decode_service=DecodeServiceConfig(address, actors=1),
        )

    plain, served = make(0, None), make(2, "local")
    want = [next(plain) for _ in range(10)]
    got = [next(served) for _ in range(4)]
    time.sleep(0.5)
    state = served.state_dict()  # the service has been given the clips of later batches
    assert same(got + [next(served) for _ in range(6)], want)
    assert max(float(batch.patches.float().std()) for batch in want) > 0
    plain.close()
    served.close()  # with its Ray, whose threads the next loader's fork should not meet
    resumed = make(0, None)
    resumed.load_state_dict(state)
    assert same([next(resumed) for _ in range(6)], want[4:])


@pytest.mark.ray
@pytest.mark.slow  # starts Ray and two processes that import torch, and replaces one: 20 to 40 s
def test_bits_errors_and_lost_actors(service, clips, make_picture, tmp_path, caplog, monkeypatch):
    how = VideoConfig()
    (tmp_path / "shard").write_bytes(b"....." + clips[0])
    films = [Media("video", [Part(clip, [0, 3, 7])], (56, 84)) for clip in clips]
    films += [Media("video", [Part(clips[1], [1]), Part(clips[2], [5, 6])], (28, 28))]  # a film in two segments
    films += [Media("video", [Part(Stretch(str(tmp_path / "shard"), 5, len(clips[0])), [2])], (28, 56))]
    films += [Media("image", [Part(make_picture(60, 60), [0])], (56, 56))]
    want = [decode_pixels(film, how) for film in films]

    def same(got) -> bool:
        return all(torch.equal(a, b) for pair in zip(want, got) for a, b in zip(*pair))

    handles = [service.start(film) for film in films]
    assert sum(len(actor.sent) for actor in service.actors) <= 2 * decode_service.UNDER_WAY  # the rest waits here
    assert same([service.finish(handle) for handle in handles])
    assert not service.waiting and not any(actor.sent for actor in service.actors)

    # What cannot be decoded is told as it would be here, and takes nothing else along.
    cut = Media("video", [Part(clips[3][:900], [0]), Part(clips[3], [0])], (28, 28))
    bad = [service.start(media) for media in (cut, films[0])]
    with pytest.raises(DataError) as here:
        decode_pixels(cut, how)
    with pytest.raises(DataError) as there:
        service.finish(bad[0])
    assert (str(there.value), there.value.reason) == (str(here.value), here.value.reason)
    assert torch.equal(service.finish(bad[1])[0], want[0][0])
    service.video = VideoConfig(backend="dali", device="cpu")
    with pytest.raises(UnsupportedCodec, match="dali on cpu cannot decode h264"):
        service.finish(service.start(films[0]))
    service.video = how

    # An actor dies in the middle: another takes its place, and every answer comes, in order.
    import ray

    first = service.actors[0].handle
    handles = [service.start(film) for film in films]
    ray.kill(first)
    with caplog.at_level(logging.WARNING):
        assert same([service.finish(handle) for handle in handles])
    assert service.actors[0].handle is not first and "another takes its place" in caplog.text

    # What ends every actor it meets is given up; what stood behind it is not.
    monkeypatch.setattr(decode_service, "ATTEMPTS", 2)
    handles = [service.start(replace_kind(films[0])), *(service.start(film) for film in films)]
    with pytest.raises(DataError, match="ended its decoder 2 times") as error:
        service.finish(handles[0])
    assert error.value.reason == "ended its decoder"
    assert same([service.finish(handle) for handle in handles[1:]])


def replace_kind(media: Media) -> Media:
    return Media(Deadly(media.kind), media.parts, media.size)
