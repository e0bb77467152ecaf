"""The DALI backend, dynamic mode: NVDEC on a GPU; on a CPU the three codecs that DALI still decodes there.

DALI's in-memory decoder does not seek, knows nothing of edit lists and rotation, and always converts colours by BT.601. So it is
fed GOP-trimmed bytes, chunk by chunk, and the rest is put right here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from keye_data.errors import DataError

from .api import Info
from .container import DamagedVideo, Source, UnsupportedCodec, opened, source_name
from .frames import chunks, resize, turn
from .packets import PacketTable
from .trim import trim

CODECS = {
    "cpu": {"vp8", "vp9", "mjpeg"},
    "gpu": {"vp8", "vp9", "mjpeg", "h264", "hevc", "mpeg4", "av1"},
}
INSTALL = "install nvidia-dali-cuda130==2.4.0"

# Rows of (red, blue) luma weights by the numbers of H.273; 2 is "not stated".
LUMA = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 7: (0.212, 0.087), 4: (0.30, 0.11)}
LUMA_601 = (0.299, 0.114)


def decode(
    src: Source, table: PacketTable, info: Info, wanted: np.ndarray, size: tuple[int, int] | None, device: str | None
) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], a chunk at a time, of `wanted` (int64 [F], ascending, no repeats)."""
    device = device if device not in (None, "auto") else ("gpu" if torch.cuda.is_available() else "cpu")
    if device not in CODECS:
        raise ValueError(f"device {device!r} is none of cpu, gpu, auto")
    if info.codec not in CODECS[device]:
        raise UnsupportedCodec(
            f"video {source_name(src)}: backend dali on {device} cannot decode {info.codec} "
            f"(only {', '.join(sorted(CODECS[device]))}); use backend pyav or re-encode"
        )
    if not table.exact:
        _refuse_uncertain(src, table, info)
    for chunk in chunks(wanted, info.height, info.width):
        data, indices = trim(src, chunk, table)
        frames = _decode(
            data, indices, device, f"video {source_name(src)}: backend dali cannot decode this {info.codec} clip"
        )
        if info.colorspace in LUMA:
            frames = recolour(frames, from_601_to(info.colorspace))
        yield resize(turn(frames, info.orientation), size)


def _refuse_uncertain(src: Source, table: PacketTable, info: Info) -> None:
    """A clip without reliable times reaches DALI whole, which counts frames its own way: refused unless that is ours."""
    with opened(src) as (container, _):
        alone = len(container.streams.video) == 1
    in_order = info.codec not in ("h264", "hevc", "mpeg4") and len(table.frames) == info.n_frames
    if not alone or not in_order or table.discard.any():
        raise DataError(
            f"video {source_name(src)}: backend dali cannot find the frames of this {info.codec} clip: "
            "its packets carry no reliable times; use backend pyav, or remux it to mp4 or webm",
            "no reliable times",
        )


def _decode(data: bytes, indices: list[int], device: str, refusal: str) -> np.ndarray:
    """uint8 [F, H, W, 3] as DALI sees it."""
    ndd = _dali()
    try:
        encoded = ndd.tensor(np.frombuffer(data, np.uint8))
        # Without pad_mode, a frame that is not there would come back black.
        video = ndd.decoders.video(encoded, device=device, frames=indices, pad_mode="none")
        video = video.evaluate()
        return np.asarray(video.cpu() if device == "gpu" else video)
    except RuntimeError as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        said = next((line for line in cause if "rror" in line and "[" not in line[:1]), cause[-1] if cause else "")
        raise DamagedVideo(f"{refusal} ({said.strip()})") from error


@cache
def _dali():
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except ImportError as error:
        raise RuntimeError(f"backend dali cannot be imported ({error}): {INSTALL}") from error
    return ndd


def from_601_to(colorspace: int) -> np.ndarray:
    """float32 [3, 3]: takes RGB made with BT.601 to what the stream's own matrix gives."""
    return (_to_rgb(*LUMA[colorspace]) @ np.linalg.inv(_to_rgb(*LUMA_601))).astype(np.float32)


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """float64 [3, 3]: Y, Cb, Cr (chroma in -0.5..0.5) -> R, G, B."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def recolour(frames: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A matrix on the colours of uint8 [F, H, W, 3], a frame at a time."""
    out = np.empty_like(frames)
    for frame, target in zip(frames, out):
        target[:] = np.rint(frame.astype(np.float32) @ matrix.T).clip(0, 255)
    return out
