"""Every decoder beside torchcodec's exact mode, one thread each, a process each. Baselines read plainly, ours by the contract.

A decoder's frames are compared with the clip read from its start before it is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gate
from benchmarks.clips import Clips
from benchmarks.measure import Cost, child, cost, least, peak_mib
from keye_data import video

BASELINE = "torchcodec exact, plain"
DECODERS = (BASELINE, "keye_data torchcodec", "keye_data pyav", "keye_data dali")
TOLERANCE = {"keye_data dali": 4.0}  # mean of 255: its chroma is interpolated otherwise; the others agree bit for bit
Decode = Callable[[str, list[int]], np.ndarray]


def plain_torchcodec(clip: str, indices: list[int]) -> np.ndarray:
    """uint8 [F, H, W, 3] by torchcodec alone."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    data = Path(clip).read_bytes()
    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return decoder.get_frames_at(indices).data.numpy()


def by_name(name: str) -> Decode:
    if name == BASELINE:
        return plain_torchcodec
    backend = name.removeprefix("keye_data ")
    return lambda clip, indices: video.decode(clip, indices, backend, device="cpu")


def measure(clips: Clips, repeats: int, torchcodec: dict[str, str] | str) -> list[dict[str, Any]]:
    """A row per codec, choice of frames and decoder. `torchcodec`: environment variables for it, or why it is not there."""
    rows: list[dict[str, Any]] = []
    for codec, clip in (("h264", clips.h264), ("vp9", clips.vp9)):
        count = video.probe(clip).n_frames
        stretch = min(240, count // 2)
        choices = {
            f"64 of {count}": np.linspace(0, count - 1, 64).round().astype(int).tolist(),
            f"{stretch} in a row": list(range(count // 4, count // 4 + stretch)),
        }
        for choice, indices in choices.items():
            tasks = {
                name: {"decoder": name, "clip": str(clip), "indices": indices, "repeats": repeats} for name in DECODERS
            }
            found = {name: _run(name, codec, task, torchcodec) for name, task in tasks.items()}
            rows += [{"codec": codec, "frames": choice, "decoder": name, **row} for name, row in found.items()]
    return with_ratios(rows)


def _run(name: str, codec: str, task: dict[str, Any], torchcodec: dict[str, str] | str) -> dict[str, Any]:
    if "torchcodec" in name and isinstance(torchcodec, str):
        return {"unverified": torchcodec}
    if name == "keye_data dali" and codec == "h264":
        return {"unverified": "DALI decodes H.264 on a GPU only"}
    environment = torchcodec if "torchcodec" in name and isinstance(torchcodec, dict) else {}
    return child("decoders.py", task, environment)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds frames per CPU second, and its ratio to torchcodec exact or, where that is not there, to PyAV."""
    for row in rows:
        if "cpu" in row:
            row["frames_per_cpu_second"] = row["count"] / row["cpu"]
    for row in rows:
        if "cpu" not in row:
            continue
        beside = {r["decoder"]: r for r in rows if (r["codec"], r["frames"]) == (row["codec"], row["frames"])}
        base = next(name for name in (BASELINE, "keye_data pyav") if "cpu" in beside[name])
        row["ratio"] = row["frames_per_cpu_second"] / beside[base]["frames_per_cpu_second"]
        row["wall_ratio"] = beside[base]["wall"] / row["wall"]
        row["ratio_to"] = base
    return rows


def timed(decode: Decode, clip: str, indices: list[int], repeats: int, tolerance: float) -> dict[str, Any]:
    """Gate, then the cheapest of `repeats` runs."""
    frames = decode(clip, indices)  # also loads what the decoder loads on first use
    worst = gate.check(Path(clip), frames, indices, tolerance)
    costs: list[Cost] = []
    del frames
    for _ in range(repeats):
        spent, _ = cost(lambda: decode(clip, indices))
        costs.append(spent)
    return {**least(costs), "count": len(indices), "worst_difference": worst, "peak_mib": peak_mib()}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    name = task["decoder"]
    row = timed(by_name(name), task["clip"], task["indices"], task["repeats"], TOLERANCE.get(name, 0.0))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
