"""Hours of film from a source folder to packed batches: exact frames, and little memory wherever a film passes."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from training_runs import command, finish, metrics, start

from keye_data import video
from keye_data.energon_source import WorkerBatch
from keye_data.loader import Loader
from keye_data.settings import VideoConfig
from keye_data.shards import build_shards
from keye_data.stretch import Stretch

MIB = 1 << 20


def numbered(frames: int, fps: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """An H.264 clip of `size` (width, height), each frame with its 16-bit number in a 4 x 4 grid; a key frame every 20."""
    width, height = size
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 20, 1
        for i in range(frames):
            luma = (40 + 175 * (i >> np.arange(16) & 1)).reshape(4, 4)[rows][:, columns].astype(np.uint8)
            planes = np.concatenate([luma, np.full((height // 2, width), 128, np.uint8)])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def read_numbers(patches: np.ndarray, grid: np.ndarray) -> list[int]:
    """The numbers in frames [P, 3, 14, 14] of one size."""
    down, across = grid[0].tolist()
    frames = patches.reshape(len(grid), down, across, 3, 14, 14).transpose(0, 1, 4, 2, 5, 3)
    frames = frames.reshape(len(grid), down * 14, across * 14, 3)
    ys, xs = [(2 * i + 1) * down * 14 // 8 for i in range(4)], [(2 * i + 1) * across * 14 // 8 for i in range(4)]
    bits = frames[:, ys][:, :, xs].mean(-1) > 127
    return (bits.reshape(len(grid), 16) << np.arange(16)).sum(1).tolist()


@pytest.fixture(scope="module")
def two_hours() -> bytes:
    return numbered(7200, 1)


def build(folder: Path, clips: dict[str, bytes | Path], *, samples: int = 1) -> Path:
    """Shards of `samples` conversations about each of `clips`, and one about all of them where there are several."""
    folder.mkdir()
    for name, clip in clips.items():
        shutil.copy(clip, folder / name) if isinstance(clip, Path) else (folder / name).write_bytes(clip)
    groups = [[name] for name in clips] * samples + ([list(clips)] if len(clips) > 1 else [])
    with (folder / "data.jsonl").open("w") as lines:
        for i, names in enumerate(groups):
            parts = [*({"type": "video", "video": name} for name in names), {"type": "text", "text": f"What? {i}"}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"Hours, {i}."}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    build_shards(folder, folder / "shards", samples_per_shard=16)
    return folder / "shards"


def test_two_hours_keep_every_frame_in_its_place(open_loader, tokenizer, two_hours, tmp_path):
    """Build, load, pack, decode: the frames of a clip that lies in 60 pieces are those that its plan names."""
    shards = build(tmp_path / "in", {"long.mp4": two_hours, "second.mp4": numbered(900, 1)})
    # an eighth of stage 3's budget in an eighth of its row, but frames of 4 tokens: 512 frames of a film
    limits = VideoConfig(min_frame_tokens=4, max_frame_tokens=16, total_tokens=2048, max_frames=360)
    loader = open_loader(shards, video=limits, seq_length=8192, packing=False, shuffle_buffer=1)
    seen = {}
    for _ in range(3):
        batch = next(loader)
        assert batch.skipped == {}
        at = np.cumsum([0, *(batch.grid.prod(1))])
        seen[batch.keys[0].rsplit("/", 1)[1]] = [
            read_numbers(batch.patches[at[i] : at[i + 1]].numpy(), batch.grid[i : i + 1].numpy())[0]
            for i in range(len(batch.grid))
        ]
        stamps = [
            float(text.split("<|vision_start|>")[0])
            for text in tokenizer.decode(batch.input_ids[0]).split("<|frame|>")[1:]
        ]
        assert stamps == seen[batch.keys[0].rsplit("/", 1)[1]]  # at one frame a second, a number is a time
    frames = np.linspace(0, 7199, 360).round().astype(int).tolist()
    assert seen["000000000"] == frames  # max_frames
    assert len(seen["000000001"]) == 2048 * 0.5 // 4  # half the budget up to 1,024 s
    both = seen["000000002"]  # two clips share the budget
    assert both == (
        np.linspace(0, 7199, 256).round().astype(int).tolist() + np.linspace(0, 899, 128).round().astype(int).tolist()
    )


def test_the_row_limits_the_budget(open_loader, two_hours, tmp_path):
    shards = build(tmp_path / "in", {"long.mp4": two_hours})
    limits = VideoConfig(min_frame_tokens=4, max_frame_tokens=16, total_tokens=100_000)
    loader = open_loader(shards, video=limits, seq_length=2048)
    batch = next(loader)
    used = int((batch.key_stop > batch.key_start).sum())
    assert 0.97 * 2048 < used <= 2048 and batch.skipped == {}
    assert read_numbers(batch.patches.numpy(), batch.grid.numpy())[-1] == 7199


def test_batches_before_decoding_hold_no_film_until_they_are_packed(open_loader, two_hours, tmp_path, monkeypatch):
    from keye_data import carry as module
    from keye_data import energon_source

    shards = build(tmp_path / "in", {"long.mp4": two_hours})
    waiting: list[Any] = []
    rooms = [1 << 30, 1 << 16, 0]

    def carry(documents):
        waiting.extend(part.data for document in documents for media in document.media for part in media.parts)
        module.carry(documents, rooms[0])

    monkeypatch.setattr(energon_source, "carry", carry)
    limits = VideoConfig(min_frame_tokens=4, max_frame_tokens=4, max_frames=200)
    want = None
    for _ in range(3):
        loader = open_loader(shards, video=limits, seq_length=8192, packing=False)
        item = next(iter(loader._loader))
        assert isinstance(item, WorkerBatch)
        parts = [part for document in item.rows.documents for media in document.media for part in media.parts]
        assert len(parts) == 60 and all(isinstance(data, Stretch) for data in waiting)
        carried = [isinstance(part.data, bytes) for part in parts]
        assert {1 << 30: all(carried), 1 << 16: any(carried) and not all(carried), 0: not any(carried)}[rooms[0]]
        pixels, _ = loader.processor.pixels(item.rows.documents[0].media[0])
        want = pixels if want is None else want
        assert (pixels == want).all()  # wherever it is trimmed
        loader.close()
        rooms.pop(0)
        waiting.clear()


def test_resume_is_exact_with_films_in_the_buffers(open_loader, two_hours, tmp_path):
    shards = build(tmp_path / "in", {"long.mp4": two_hours, "second.mp4": numbered(900, 1)}, samples=3)
    limits = VideoConfig(min_frame_tokens=4, max_frame_tokens=4, max_frames=24)
    options = {"seq_length": 1024, "workers": 1}
    loader = open_loader(shards, video=limits, **options)
    next(loader)
    state = loader.state_dict()
    want = [next(loader) for _ in range(2)]
    loader.close()
    resumed = open_loader(shards, video=limits, **options)
    resumed.load_state_dict(state)
    for one in want:
        other = next(resumed)
        assert one.keys == other.keys and (one.input_ids == other.input_ids).all()
        assert (one.patches == other.patches).all() and one.skipped == other.skipped == {}


def test_film_that_vanishes_behind_the_buffers_masks_its_document(open_loader, two_hours, tmp_path, caplog):
    shards = build(tmp_path / "in", {"long.mp4": two_hours})
    limits = VideoConfig(min_frame_tokens=4, max_frame_tokens=4, max_frames=100)
    loader = open_loader(shards, video=limits, seq_length=8192, packing=False)
    tar = next(shards.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    at = data.index(b".007.mp4") // 512 * 512 + 512  # the member behind this header
    data[at : at + 4096] = b"\xa5" * 4096
    tar.write_bytes(data)
    batch = next(loader)
    assert batch.skipped == {"corrupt clip": 1} and batch.bad[0].masked and batch.bad[0].key == batch.keys[0]
    assert (batch.targets == -100).all() and batch.keys[0] in caplog.text
    assert (batch.patches == 0).all() and len(batch.grid) == 100


@pytest.mark.slow  # 230 MB of film are built into shards
def test_a_real_hour_is_exact(open_loader, hour_of_film, tmp_path):
    shards = build(tmp_path / "in", {"film.mp4": hour_of_film})
    limits = VideoConfig(min_frame_tokens=16, max_frame_tokens=32, max_frames=10)
    loader = open_loader(shards, video=limits, seq_length=1024, packing=False)
    batch = next(loader)
    loader.close()
    frames = np.linspace(0, video.probe(hour_of_film).n_frames - 1, 10).round().astype(int)
    height, width = (batch.grid[0] * 14).tolist()
    want = video.decode(hour_of_film, frames, size=(height, width))
    want = want.reshape(10, height // 14, 14, width // 14, 14, 3).transpose(0, 1, 3, 5, 2, 4)
    np.testing.assert_array_equal(batch.patches.numpy(), want.reshape(-1, 3, 14, 14))


def peak_memory(pid: int) -> int:
    """The most that was resident of a process, shared pages too, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def watch(loader: Loader, samples: int) -> tuple[int, list[int], int]:
    """Takes batches from the loader's only worker as it sends them -> (frames planned, bytes of its own after each, its peak).

    Its own are those it does not share with this process, from which it was forked: what it fills of pages that it
    inherited counts among them.
    """
    before = {child.pid for child in multiprocessing.active_children()}
    taken, frames, now, worker = 0, 0, [], 0
    for item in loader._loader:
        worker = next(p for p in (child.pid or 0 for child in multiprocessing.active_children()) if p not in before)
        taken += len(item.rows.documents)
        frames += sum(media.n_frames for document in item.rows.documents for media in document.media)
        assert item.skipped == []
        now.append(psutil.Process(worker).memory_full_info().uss)
        if taken >= samples:
            break
    peak = peak_memory(worker)
    loader.close()
    print(f"{taken} samples, {frames} frames; worker: peak {peak / MIB:.0f} MiB, by eighths", end=" ")
    print([int(max(part)) // MIB for part in np.array_split(now, min(8, len(now)))])
    return frames, now, peak


@pytest.mark.slow  # 230 MB of film are read and trimmed for every sample
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_of_a_worker_is_bounded_on_a_real_hour(open_loader, hour_of_film, tmp_path):
    """At stage 3's budget, 2,880 frames of 64 tokens: all groups of the film are needed, 230 MB."""
    shards = build(tmp_path / "in", {"film.mp4": hour_of_film}, samples=2)
    loader = open_loader(shards, video=VideoConfig(), seq_length=262_144, workers=1, packing_buffer=2)
    frames, _, peak = watch(loader, 4)
    assert frames == 4 * 2880
    assert peak < 1500 * MIB


@pytest.mark.slow  # 200 samples of 60 segments each
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_of_a_worker_does_not_grow(open_loader, two_hours, tmp_path):
    """200 samples of two hours in a forked worker, at stage 3's total budget."""
    shards = build(tmp_path / "in", {"long.mp4": two_hours}, samples=40)
    limits = VideoConfig(max_frames=360)
    loader = open_loader(shards, video=limits, seq_length=262_144, workers=1, packing_buffer=16)
    frames, now, peak = watch(loader, 200)
    assert frames >= 200 * 360  # rows hold several samples
    assert peak < 1500 * MIB
    quarters = [max(part) for part in np.array_split(now, 4)]
    assert quarters[3] - quarters[1] < 32 * MIB  # buffers are full by the second


@pytest.mark.slow  # a training run of its own, which decodes an hour of film at 720p on the CPU
def test_hours_of_film_train(hour_of_film, two_hours, qwen_tiktoken, tmp_path):
    """One step of stage 3's mini profile, whose rows and budget are stage 3's scaled down, on both long clips."""
    shards = build(tmp_path / "in", {"film.mp4": hour_of_film, "long.mp4": two_hours})
    words = command(
        tmp_path / "run",
        shards,
        qwen_tiktoken,
        *("data.seq_length=2048", "data.packing=false", "data.shuffle_buffer=1", "training.steps=1"),
        *("training.global_batch_size=3", "training.micro_batch_size=1"),
        recipe="stage3",
    )
    code, text = finish(start(words), timeout=500)
    assert code == 0, text[-3000:]
    (step,) = [row for row in metrics(tmp_path / "run") if "lm loss" in row]
    assert np.isfinite(step["lm loss"]) and step["consumed samples"] == 3 and not step.get("skipped-samples")
    print({name: step[name] for name in step if "loss" in name or "sample" in name or "decode" in name})
