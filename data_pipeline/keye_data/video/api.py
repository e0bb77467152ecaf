"""`probe` and `decode`: the contract in front of the backends."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from av import VideoFrame
from av.video.stream import VideoStream

from .container import DamagedVideo, Source, check_size, opened, source_name
from .frames import UPRIGHT, Orientation, orientation
from .packets import PacketTable, scan
from .with_pyav import all_frames, wanted_frames
from .with_pyav import decode as decode_with_pyav

BACKENDS = ("pyav", "dali", "torchcodec")


@dataclass
class Info:
    """What a clip holds. Width and height are those of the displayed frame, after rotation."""

    n_frames: int
    timestamps: np.ndarray  # float64 [n_frames], seconds from the first frame, ascending
    width: int
    height: int
    codec: str
    orientation: Orientation = UPRIGHT  # how the coded frame is turned for display
    colorspace: int = 2  # the stream's matrix as H.273 numbers them; 2: not stated

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is taken to last as long as the mean one."""
        last = float(self.timestamps[-1])
        return last + last / (self.n_frames - 1) if self.n_frames > 1 else 0.0


def probe(src: Source, table: PacketTable | None = None) -> Info:
    """Frame count, times, displayed size and codec. Reads every packet, decodes one frame. DataError when damaged.

    `table` saves a scan.
    """
    table = table or scan(src)
    name = source_name(src)
    with opened(src) as (container, stream):
        if table.exact:
            pts = table.pts[table.frames]
            first = next((f for _, f in wanted_frames(container, stream, table, np.zeros(1, np.int64))), None)
        else:
            pts, first = _frame_times(all_frames(container, stream), stream)
    if first is None:
        raise DamagedVideo(f"video {name}: no frame can be decoded")
    check_size(first.width, first.height, f"video {name}")
    how = orientation(first)
    height, width = (first.width, first.height) if how[0] else (first.height, first.width)
    times = (pts - pts[0]).astype(np.float64) * float(table.time_base)
    return Info(len(pts), times, width, height, table.codec, how, int(first.colorspace))


def _frame_times(frames: Iterator[VideoFrame], stream: VideoStream) -> tuple[np.ndarray, VideoFrame | None]:
    """int64 pts of every decoded frame and the first frame; an even spacing where the stream gives no rising times."""
    first: VideoFrame | None = None
    pts: list[int | None] = []
    for frame in frames:
        first = first or frame
        pts.append(frame.pts)
    times = np.array([p or 0 for p in pts], np.int64)
    if None in pts or (np.diff(times) <= 0).any():
        rate = stream.average_rate or stream.guessed_rate or 25
        times = np.round(np.arange(len(pts)) / float(rate * (stream.time_base or 1))).astype(np.int64)
    return times, first


def decode(
    src: Source,
    indices: Sequence[int] | np.ndarray,
    backend: str | None = None,
    size: tuple[int, int] | None = None,
    *,
    device: str | None = None,
) -> np.ndarray:
    """uint8 [F, H, W, 3]: exactly the frames `indices`, in that order; any order, repeats allowed.

    `size` is (height, width) after rotation, reached by bicubic interpolation with antialias; None keeps the displayed size.
    `backend` is "pyav" (None), "dali" or "torchcodec"; `device` says where DALI decodes: "cpu", "gpu", None for whichever is there.
    IndexError for an index out of range; UnsupportedCodec (a ValueError) for a codec the backend cannot do; DataError for a
    damaged clip.
    """
    asked = np.array([operator.index(i) for i in indices], np.int64)
    wanted, where = np.unique(asked, return_inverse=True)
    frames, at = np.empty((0, *(size or (0, 0)), 3), np.uint8), 0
    for chunk in decode_chunks(src, wanted, backend, size, device=device):
        if at == 0:
            frames = np.empty((len(wanted), *chunk.shape[1:]), np.uint8)
        frames[at : at + len(chunk)] = chunk
        at += len(chunk)
    if not len(wanted) and size is None:
        info = probe(src)
        return np.empty((0, info.height, info.width, 3), np.uint8)
    return frames if len(wanted) == len(asked) and (np.diff(asked) > 0).all() else frames[where]


def decode_chunks(
    src: Source,
    wanted: np.ndarray,
    backend: str | None = None,
    size: tuple[int, int] | None = None,
    *,
    device: str | None = None,
) -> Iterator[np.ndarray]:
    """The frames `wanted` (int64, ascending, no repeats) as uint8 [f, H, W, 3], f at most CHUNK; otherwise as `decode`.

    Of frames at their own size no more than one chunk of CHUNK_BYTES is alive at a time.
    """
    backend = backend or "pyav"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if size is not None:
        check_size(size[1], size[0], "size=(height, width)")
    table = scan(src)
    # The table alone is enough where it can be, so that no frame is decoded twice.
    info = None if backend == "pyav" and table.exact and len(wanted) else probe(src, table)
    count = info.n_frames if info else len(table.frames)
    outside = wanted[(wanted < 0) | (wanted >= count)]
    if len(outside):
        raise IndexError(f"video {source_name(src)}: frame {outside[0]} asked for, it has 0..{count - 1}")
    if not len(wanted):
        return
    if info is None or backend == "pyav":
        yield from decode_with_pyav(src, table, wanted, size)
    elif backend == "dali":
        from .with_dali import decode as decode_with_dali

        yield from decode_with_dali(src, table, info, wanted, size, device)
    else:
        from .with_torchcodec import decode as decode_with_torchcodec

        yield from decode_with_torchcodec(src, table, info, wanted, size)
