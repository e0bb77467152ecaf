"""Our loader from shards to patches, against the bare decoder, in frames per second; a process each for the two backends.

The bare decoder is keye_data.video.decode in a plain loop over the same clips, trimmed beforehand, for the same frames at the same
size: no shards, no workers, no packing, no patches. Both decode in one process; the loader's workers read, plan and trim beside it.
Runs alternate, and the least disturbed of each counts. The loader's pixels are compared with the bare decoder's first, to the bit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from benchmarks.clips import Clips
from benchmarks.gate import WrongFrames
from benchmarks.measure import Cost, child, cost
from keye_data import video
from keye_data.budget import plan_frames, video_budget
from keye_data.loader import Loader
from keye_data.processor import Processor
from keye_data.sample import Batch
from keye_data.settings import DataConfig, SourceConfig, VideoConfig
from keye_data.shards import build_shards
from keye_data.tokenizer import load_tokenizer

TARGET = 0.9
ROW = 32_768  # tokens: several clips of ten seconds each
Decode = Callable[[bytes, Sequence[int], tuple[int, int]], np.ndarray]


@dataclass
class Trimmed:
    """What the bare decoder is given."""

    data: bytes
    frames: list[int]
    size: tuple[int, int]  # height, width


def measure(clips: Clips, tokenizer: Path, rounds: int, batches: int, piece: float = 10.0) -> list[dict[str, Any]]:
    """A row per backend: PyAV on H.264, DALI on VP9."""
    rows = []
    for backend, clip in (("pyav", clips.h264), ("dali", clips.vp9)):
        task = {
            "backend": backend,
            "clip": str(clip),
            "tokenizer": str(tokenizer),
            "rounds": rounds,
            "batches": batches,
            "piece": piece,
        }
        rows.append({"backend": backend, **child("end_to_end.py", task)})
    return rows


def run(task: dict[str, Any], decode: Decode | None = None) -> dict[str, Any]:
    """One row. `decode` stands in for the bare decoder in tests of the gate."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pieces = cut(Path(task["clip"]), folder / "source", task["piece"])
        build_shards(folder / "source" / "list.jsonl", folder / "shards")
        settings = DataConfig(
            tokenizer=task["tokenizer"],
            sources=[SourceConfig(str(folder / "shards"))],
            seq_length=ROW,
            video=VideoConfig(backend=task["backend"], device="cpu"),
        )
        trimmed = [planned(path, settings.video) for path in pieces]
        decode = decode or (lambda data, frames, size: video.decode(data, frames, task["backend"], size, device="cpu"))
        ours: list[Cost] = []
        bare: list[Cost] = []
        workers: list[float] = []
        order: list[int] = []
        for number in range(task["rounds"]):
            spent, beside, seen = _loader(settings, task["batches"])
            ours.append(spent)
            workers.append(beside)
            if number == 0:
                check(seen[0], trimmed, decode)
                order = [sample for batch in seen for sample in samples_of(batch)]  # the seed makes it every round's
            bare.append(_bare([trimmed[i] for i in order], decode))
        count = sum(len(trimmed[i].frames) for i in order)
        settings_row = {"row": ROW, "workers": settings.workers, "decoding_processes": 1, "batches": task["batches"]}
    return {
        "settings": settings_row | {"packing_buffer": settings.packing_buffer, "clips": len(pieces)},
        "frames": count,
        "loader": [{**asdict(one), "workers_cpu": beside} for one, beside in zip(ours, workers)],
        "bare": [asdict(one) for one in bare],
        "loader_frames_per_second": count / min(one.wall for one in ours),
        "bare_frames_per_second": count / min(one.wall for one in bare),
        "ratio": min(one.wall for one in bare) / min(one.wall for one in ours),
        "decoding_cpu_ratio": min(one.cpu for one in bare) / min(one.cpu for one in ours),
        "cpu_ratio": min(one.cpu for one in bare) / min(one.cpu + more for one, more in zip(ours, workers)),
        "target": TARGET,
    }


def _bare(clips: Sequence[Trimmed], decode: Decode) -> Cost:
    spent, _ = cost(lambda: [len(decode(clip.data, clip.frames, clip.size)) for clip in clips])
    return spent


def cut(clip: Path, folder: Path, seconds: float) -> list[Path]:
    """Pieces of about `seconds` by stream copy, as one-clip conversations in folder/list.jsonl."""
    folder.mkdir()
    table, info = video.scan(clip), video.probe(clip)
    step = round(seconds * (info.n_frames - 1) / float(info.timestamps[-1]))
    pieces = []
    with (folder / "list.jsonl").open("w") as lines:
        for number, at in enumerate(range(0, info.n_frames - step + 1, step)):
            pieces.append(folder / f"{number}{clip.suffix}")
            pieces[-1].write_bytes(video.trim(clip, range(at, at + step), table)[0])
            content = [{"type": "video", "video": pieces[-1].name}, {"type": "text", "text": "What happens?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A rabbit wakes up."}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return pieces


def planned(path: Path, limits: VideoConfig) -> Trimmed:
    """The frames and the size that the budget gives a clip, and the packets they need."""
    info = video.probe(path)
    plan = plan_frames(
        info.n_frames, info.duration, info.height, info.width, limits, budget=video_budget(info.duration, limits)
    )
    data, frames = video.trim(path, plan.indices)
    return Trimmed(data, frames, plan.size)


def samples_of(batch: Batch) -> list[int]:
    """Numbers of the samples, which are keyed shard by shard in the order of the list."""
    return [int(Path(key).name) for key in batch.keys]


def check(batch: Batch, trimmed: Sequence[Trimmed], decode: Decode) -> None:
    """WrongFrames unless the batch's patches are the pixels of the bare decoder, frame by frame."""
    at = frame = 0
    for sample in samples_of(batch):
        clip = trimmed[sample]
        for picture in decode(clip.data, clip.frames, clip.size):
            down, across = (int(n) for n in batch.grid[frame])
            tiles = batch.patches[at : at + down * across].reshape(down, across, 3, 14, 14)
            ours = tiles.permute(0, 3, 1, 4, 2).reshape(down * 14, across * 14, 3).numpy()
            if not np.array_equal(ours, picture):
                raise WrongFrames(f"loader: sample {sample}: frame {frame} of the batch is not the bare decoder's")
            at, frame = at + down * across, frame + 1
    if at != len(batch.patches) or frame != len(batch.grid):
        raise WrongFrames(f"loader: {len(batch.grid)} frames where the bare decoder has {frame}")


def _loader(settings: DataConfig, batches: int) -> tuple[Cost, float, list[Batch]]:
    """This process's cost of `batches` batches behind the first, the workers' CPU seconds, the batches (first with pixels)."""
    processor = Processor(load_tokenizer(settings.tokenizer), settings)
    loader = Loader(settings, processor, rank=0, world_size=1, micro_batch_size=1, seed=1)
    try:
        next(loader)  # workers start, the packing buffer fills
        before = _workers_cpu()
        spent, seen = cost(lambda: [_light(next(loader), number) for number in range(batches)])
        return spent, _workers_cpu() - before, seen
    finally:
        loader.close()


def _light(batch: Batch, number: int) -> Batch:
    if batch.bad:
        raise WrongFrames(f"loader: {batch.bad[0].message}")
    if number:
        batch.patches = torch.empty(0)
    return batch


def _workers_cpu() -> float:
    """Seconds that the child processes have taken so far."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(run(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
