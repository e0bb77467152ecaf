"""A few frames of an hour of film, with GOP trim against without, in CPU seconds; each way in a process of its own.

DALI's in-memory decoder does not seek, nor does a plain sequential read: those are what the trim saves. Seeking by PyAV needs no
trim to be quick and stands beside. The trim's own cost, packet scan included, counts.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.clips import Clips
from benchmarks.gate import WrongFrames
from benchmarks.measure import child, cost, peak_mib
from keye_data import video

TARGET = 8.0
WAYS = {
    "dali": ("vp9", ("whole", "trimmed")),
    "pyav in order": ("h264", ("whole", "trimmed")),
    "pyav seeking": ("h264", ("whole",)),
}


def measure(clips: Clips, count: int, cache: Path) -> dict[str, Any]:
    """CPU and wall seconds of every way for `count` frames evenly over the hour; ratios per decoder.

    WrongFrames unless trimmed and whole give the same pixels, and seeking those of reading in order.
    """
    files = {"h264": clips.h264_hour, "vp9": clips.vp9_hour}
    rows, pixels = [], {}
    for decoder, (codec, forms) in WAYS.items():
        for form in forms:
            kept = cache / f".{decoder.replace(' ', '_')}.{form}.npy"
            task = {"decoder": decoder, "form": form, "clip": str(files[codec]), "count": count, "keep": str(kept)}
            try:
                row = child("trimming.py", task)
                pixels[decoder, form] = np.load(kept, mmap_mode="r")
            finally:
                kept.unlink(missing_ok=True)  # the map keeps what it needs
            rows.append({"decoder": decoder, "codec": codec, "form": form, **row})
    for decoder in ("dali", "pyav in order"):
        same(pixels[decoder, "whole"], pixels[decoder, "trimmed"], f"{decoder}, whole and trimmed")
    same(pixels["pyav in order", "whole"], pixels["pyav seeking", "whole"], "pyav in order and seeking")
    cpu = {(row["decoder"], row["form"]): row["cpu"] for row in rows}
    ratios = {d: cpu[d, "whole"] / cpu[d, "trimmed"] for d in ("dali", "pyav in order")}
    return {"settings": {"frames": count}, "rows": rows, "ratio": ratios, "target": TARGET}


def same(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """WrongFrames at the first frame that is not the same to the bit."""
    if a.shape != b.shape:
        raise WrongFrames(f"{what}: {a.shape[0]} and {b.shape[0]} frames")
    for number, (one, other) in enumerate(zip(a, b)):
        if not np.array_equal(one, other):
            raise WrongFrames(f"{what}: frame {number} of {len(a)} differs")


def frames_of(decoder: str, form: str, clip: str, indices: Sequence[int]) -> np.ndarray:
    """uint8 [F, H, W, 3]: `indices` (ascending) of the clip, which is trimmed first or not."""
    if decoder == "pyav seeking":
        return video.decode(clip, indices, "pyav")
    if form == "trimmed":
        data, places = video.trim(clip, indices)
    else:
        data, places = Path(clip).read_bytes(), list(indices)
    return _dali(data, places) if decoder == "dali" else _in_order(data, places)


def _dali(data: bytes, indices: list[int]) -> np.ndarray:
    import nvidia.dali.experimental.dynamic as ndd

    encoded = ndd.tensor(np.frombuffer(data, np.uint8))
    return np.asarray(ndd.decoders.video(encoded, device="cpu", frames=indices, pad_mode="none").evaluate())


def _in_order(data: bytes, indices: list[int]) -> np.ndarray:
    found = []
    wanted = set(indices)
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
                if number == indices[-1]:
                    break
    return np.stack(found)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    total = video.probe(task["clip"]).n_frames
    indices = np.linspace(0, total - 1, task["count"]).round().astype(int).tolist()
    if task["decoder"] == "dali":
        import nvidia.dali.experimental.dynamic  # noqa: F401  (its import is not the decoder's cost)
    spent, frames = cost(lambda: frames_of(task["decoder"], task["form"], task["clip"], indices))
    np.save(task["keep"], frames)
    print(json.dumps({"cpu": spent.cpu, "wall": spent.wall, "peak_mib": peak_mib(), "of_frames": total}))


if __name__ == "__main__":
    main()
