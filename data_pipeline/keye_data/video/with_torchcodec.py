"""The torchcodec backend: optional, a third opinion.

It sees rotation but not mirrors, takes full-range colours for limited ones, and counts what an edit list hides: the last is
put right here by trimming, the others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from keye_data.errors import DataError

from .api import Info
from .container import DamagedVideo, Source, opened, source_bytes, source_name
from .frames import chunks, resize
from .packets import PacketTable, scan
from .trim import trim

INSTALL = "install torchcodec for your torch (CPU builds: torchcodec==0.13.0 with --no-deps) and FFmpeg's libraries"
FULL_RANGE = 2  # as FFmpeg numbers colour ranges


def decode(
    src: Source, table: PacketTable, info: Info, wanted: np.ndarray, size: tuple[int, int] | None
) -> Iterator[np.ndarray]:
    """uint8 [f, H, W, 3], a chunk at a time, of `wanted` (int64 [F], ascending, no repeats). torchcodec applies the rotation itself."""
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"backend torchcodec cannot be imported ({str(error).splitlines()[0]}): {INSTALL}"
        ) from error
    stream = _refuse_uncertain(src, table, info)
    data, count = source_bytes(src), info.n_frames
    if table.discard.any():
        (data, indices), stream = trim(src, wanted, table), 0
        wanted, count = np.array(indices), len(scan(data).frames)
    try:
        # Only "exact" is right for a variable frame rate.
        decoder = VideoDecoder(
            data, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        if len(decoder) != count:
            raise _refusal(src, info, f"it sees {len(decoder)} of {count} frames")
        for chunk in chunks(wanted, info.height, info.width):
            yield np.concatenate([resize(decoder.get_frame_at(int(i)).data[None].numpy(), size) for i in chunk])
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise _refusal(src, info, str(error).splitlines()[0]) from error


def _refuse_uncertain(src: Source, table: PacketTable, info: Info) -> int:
    """The number of the picture stream. DataError for what torchcodec is known to return wrong without a word."""
    if not table.exact:
        raise _refusal(src, info, "its packets carry no reliable times")
    transpose, rows, columns = info.orientation
    if transpose == (rows == columns):
        raise _refusal(src, info, "it is mirrored")
    with opened(src) as (_, stream):
        codec = stream.codec_context
        if codec.color_range == FULL_RANGE and (codec.pix_fmt or "").startswith("yuv4"):
            raise _refusal(src, info, "its colours use the full range")
        return stream.index


def _refusal(src: Source, info: Info, why: str) -> DamagedVideo:
    return DamagedVideo(
        f"video {source_name(src)}: backend torchcodec cannot decode this {info.codec} clip ({why}); use backend pyav"
    )
