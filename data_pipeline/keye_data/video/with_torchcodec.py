"""The torchcodec backend: optional, a third opinion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from keye_data.errors import DataError

from .api import Info
from .container import DamagedVideo, Source, source_bytes, source_name
from .frames import chunks, resize

INSTALL = "install torchcodec for your torch (CPU builds: torchcodec==0.13.0 with --no-deps) and FFmpeg's libraries"


def decode(src: Source, info: Info, wanted: np.ndarray, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], a chunk at a time, of `wanted` (int64 [F], ascending, no repeats). torchcodec applies the rotation itself."""
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"backend torchcodec cannot be imported ({str(error).splitlines()[0]}): {INSTALL}"
        ) from error
    try:
        # Only "exact" is right for a variable frame rate.
        decoder = VideoDecoder(source_bytes(src), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        if len(decoder) != info.n_frames:
            raise DamagedVideo(
                f"video {source_name(src)}: torchcodec sees {len(decoder)} of {info.n_frames} frames; use pyav"
            )
        for chunk in chunks(wanted, info.height, info.width):
            yield np.concatenate([resize(decoder.get_frame_at(int(i)).data[None].numpy(), size) for i in chunk])
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DamagedVideo(
            f"video {source_name(src)}: torchcodec cannot decode it ({str(error).splitlines()[0]})"
        ) from error
