"""Frames per second of a GPU's video engines by threads: DALI beside torchcodec's CUDA decoder or PyNvVideoCodec.

A batch of clips, the frames that training takes of them at two a second. Without a GPU the same code is rehearsed on a CPU: that
shows that it runs and returns the right frames, and nothing about NVDEC. No figure of a GPU has been taken with it yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gate
from benchmarks.clips import Clips
from benchmarks.measure import child, cost, least
from keye_data import video

THREADS = (1, 2, 4, 8, 16)
TOLERANCE = 4.0  # mean of 255: DALI converts colours by BT.601 whatever the film says
EVERY = 12  # of 24 frames a second
DECODERS = ("dali", "torchcodec", "PyNvVideoCodec")
Batch = Callable[[], list[Any]]  # decodes a batch, a tensor a clip, on the device


def measure(
    clips: Clips, repeats: int, torchcodec: dict[str, str] | str, device: str | None = None, rehearsal: bool = False
) -> dict[str, Any]:
    """A row per decoder and number of threads on `device`: "gpu" or "cpu", None for whichever is there.

    A rehearsal, which a CPU's always is, takes two clips and one or two threads.
    """
    import torch

    device = device or ("gpu" if torch.cuda.is_available() else "cpu")
    small = rehearsal or device == "cpu"
    batch, threads, repeats = (2, (1, 2), 1) if small else (16, THREADS, repeats)
    clip = clips.h264 if device == "gpu" else clips.vp9
    rows: list[dict[str, Any]] = []
    for decoder in DECODERS:
        task: dict[str, Any] = {
            "decoder": decoder,
            "device": device,
            "clip": str(clip),
            "batch": batch,
            "repeats": repeats,
        }
        if decoder == "PyNvVideoCodec" and device == "cpu":
            rows.append({"decoder": decoder, "unverified": "needs a GPU"})
            continue
        if decoder == "torchcodec" and isinstance(torchcodec, str):
            rows.append({"decoder": decoder, "unverified": torchcodec})
            continue
        environment = torchcodec if decoder == "torchcodec" and isinstance(torchcodec, dict) else {}
        for count in threads:
            try:
                row = child("nvdec.py", task | {"threads": count}, environment)
            except RuntimeError as error:
                if decoder == "dali" or gate.WrongFrames.__name__ in str(error):
                    raise  # a wrong decoder stops the benchmark; one that is not there is only said to be
                rows.append({"decoder": decoder, "unverified": str(error)})
                break
            rows.append({"decoder": decoder, "threads": count, **row})
    return {"device": device, "settings": {"clips_in_a_batch": batch, "clip": clip.name}, "rows": rows}


def dali(clip: Path, indices: list[int], batch: int, threads: int, device: str) -> Batch:
    """One pipeline that decodes `batch` copies of the clip at a time; its results stay where they were decoded."""
    from nvidia.dali import fn, pipeline_def, types

    data = [np.fromfile(clip, np.uint8)] * batch
    frames = [np.array(indices, np.int32)] * batch

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        wanted = fn.external_source(name="wanted", dtype=types.INT32, ndim=1)
        # Without pad_mode, a frame that is not there would come back black.
        decoder_device = "mixed" if device == "gpu" else "cpu"
        return fn.decoders.video(encoded, device=decoder_device, frames=wanted, pad_mode="none")

    built = pipeline()
    built.build()

    def run() -> list[Any]:
        built.feed_input("encoded", data)
        built.feed_input("wanted", frames)
        (out,) = built.run()
        return list(out)

    return run


def torchcodec(clip: Path, indices: list[int], batch: int, threads: int, device: str) -> Batch:
    """`threads` Python threads, a decoder a clip."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    data = clip.read_bytes()
    where = "cuda" if device == "gpu" else "cpu"

    def one(_: int) -> Any:
        decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device=where)
        return decoder.get_frames_at(indices).data

    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(one, range(batch)))


def pynvvideocodec(clip: Path, indices: list[int], batch: int, threads: int, device: str) -> Batch:
    """The same with PyNvVideoCodec."""
    import PyNvVideoCodec as codec  # type: ignore[import-not-found]
    import torch

    def one(_: int) -> Any:
        decoder = codec.SimpleDecoder(
            str(clip), gpu_id=0, use_device_memory=True, output_color_type=codec.OutputColorType.RGB
        )
        frames = decoder.get_batch_frames_by_index(indices)
        return torch.stack([torch.from_dlpack(frame) for frame in frames])

    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(one, range(batch)))


def host(clip: Any) -> np.ndarray:
    """uint8 [F, H, W, 3] of what a decoder left on the device."""
    if hasattr(clip, "as_cpu"):  # DALI's
        clip = clip.as_cpu()
    return clip.cpu().numpy() if hasattr(clip, "cpu") else np.asarray(clip)


WAYS = {"dali": dali, "torchcodec": torchcodec, "PyNvVideoCodec": pynvvideocodec}


def _finished(run: Batch, device: str) -> None:
    """A batch, and the wait until the GPU has it."""
    results = run()
    if device == "gpu":
        import torch

        torch.cuda.synchronize()
    del results


def main() -> None:
    task = json.loads(sys.argv[1])
    clip, batch = Path(task["clip"]), task["batch"]
    indices = list(range(0, video.probe(clip).n_frames, EVERY))
    run = WAYS[task["decoder"]](clip, indices, batch, task["threads"], task["device"])
    results = [host(one) for one in run()]
    worst = gate.check(clip, results[0], indices, TOLERANCE)
    for other in results[1:]:
        if not np.array_equal(other, results[0]):
            raise gate.WrongFrames(f"{clip.name}: two copies of it in one batch are not decoded alike")
    del results
    costs = [cost(lambda: _finished(run, task["device"]))[0] for _ in range(task["repeats"])]
    wall = min(one.wall for one in costs)
    count = len(indices) * batch
    row = {**least(costs), "wall": wall, "count": count, "frames_per_second": count / wall, "worst_difference": worst}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
