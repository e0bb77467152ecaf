"""Opening a container: which ones, how large, and one kind of error for everything that can be wrong with it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, TypeAlias

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from keye_data.errors import DataError
from keye_data.stretch import Stretch

# A path, or the bytes of a container, also those that still lie in a shard.
Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Stretch"
IN_MEMORY = (bytes, bytearray, memoryview)

MAX_BYTES = 64 << 30  # of one container
MAX_SIDE = 16_384  # pixels, of a frame or picture
MAX_PIXELS = 1 << 26  # of one frame or picture: 8192 x 8192
# Play lists and the like are left out on purpose: they open further files and addresses.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,gif,ogg,asf,ivf,nut,h264,hevc,m4v,mpegvideo,mjpeg,apng"


class UnsupportedCodec(DataError):
    """The chosen backend cannot decode this codec: the choice is wrong, not the file."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "unsupported codec")


class DamagedVideo(DataError):
    """A clip that is cut short, damaged, or no clip at all."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "damaged video")


class Broken(Exception):
    """What is wrong inside a clip, where its name is not known; `opened` makes it a DamagedVideo."""


def source_name(src: Source) -> str:
    if isinstance(src, Stretch):
        return f"{src.size} bytes from {src.offset} on of {src.path}"
    return f"{len(src)} bytes" if isinstance(src, IN_MEMORY) else os.fspath(src)


def source_bytes(src: Source) -> bytes:
    if isinstance(src, IN_MEMORY):
        return bytes(src)
    with read_source(src) as file:
        return file.read()


def read_source(src: Source) -> BinaryIO:
    """An open file with the container's bytes."""
    if isinstance(src, IN_MEMORY):
        return io.BytesIO(src)
    return src.open() if isinstance(src, Stretch) else open(src, "rb")


def check_size(width: int, height: int, what: str) -> None:
    if width < 1 or height < 1:
        raise DataError(f"{what}: has no pixels ({width} x {height})", "no pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(
            f"{what}: {width} x {height} is larger than the bounds ({MAX_SIDE} px a side, {MAX_PIXELS} in all); scale it down",
            "too large",
        )


@contextmanager
def opened(src: Source, backend: str = "pyav") -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its picture stream, closed afterwards. Every failure inside becomes a DataError naming `src`."""
    name = source_name(src)
    try:
        size = len(src) if isinstance(src, (*IN_MEMORY, Stretch)) else os.path.getsize(src)
        if size == 0:
            raise DamagedVideo(f"video {name}: is empty")
        if size > MAX_BYTES:
            raise DataError(
                f"video {name}: {size} bytes are more than the bound of {MAX_BYTES}; cut it into segments", "too large"
            )
        options = {"format_whitelist": FORMATS}
        with ExitStack() as stack:
            # "file:" keeps a name with a colon in it from being taken for a network address.
            if isinstance(src, (*IN_MEMORY, Stretch)):
                target: Any = stack.enter_context(read_source(src))
            else:
                target = "file:" + os.fspath(src)
            container = stack.enter_context(av.open(target, "r", options=options, metadata_errors="replace"))
            stream = next((s for s in container.streams.video if not s.disposition & s.disposition.attached_pic), None)
            if stream is None:
                raise DamagedVideo(f"video {name}: holds no video stream")
            if stream.codec_context is None:
                raise UnsupportedCodec(f"video {name}: backend {backend} has no decoder for this codec")
            stream.codec_context.thread_count = 1  # workers are the unit of parallelism
            check_size(stream.codec_context.width, stream.codec_context.height, f"video {name}")
            yield container, stream
    except Broken as error:
        raise DamagedVideo(f"video {name}: {error}") from error
    except (av.error.FileNotFoundError, av.error.PermissionError) as error:
        raise DataError(f"video {name}: cannot be opened ({error.strerror})", "missing media") from error
    except av.error.FFmpegError as error:
        raise DamagedVideo(
            f"video {name}: cannot be read ({error.strerror or error}); it is damaged or no video"
        ) from error
    except OSError as error:
        raise DataError(f"video {name}: cannot be opened ({error.strerror or error})", "missing media") from error


def refuse_cut_short(src: Source) -> None:
    """DataError if a container ends before its own headers say so: MP4 boxes, Matroska's segment, RIFF."""
    name = source_name(src)
    try:
        end, total = _stated_end(src)
    except OSError as error:
        raise DataError(f"video {name}: cannot be opened ({error.strerror or error})", "missing media") from error
    if end > total:
        raise DamagedVideo(f"video {name}: is cut short: its headers speak of {end} bytes, {total} are there")


def _stated_end(src: Source) -> tuple[int, int]:
    with read_source(src) as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(64)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"styp"):
            end = _mp4_end(file, total)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(head)
        elif head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little") if head[4:8] != b"\0\0\0\0" else 0
        else:
            end = 0
    return end, total


def _mp4_end(file: BinaryIO, total: int) -> int:
    """Where the last box that matters ends."""
    at = end = 0
    while at + 8 <= total:
        file.seek(at)
        box = file.read(16)
        size, kind = int.from_bytes(box[:4], "big"), box[4:8]
        if size == 1:
            size = int.from_bytes(box[8:16], "big")
        if size < 8:  # 0: up to the end of the file; anything else is not a box
            break
        at += size
        if kind in (b"mdat", b"moov", b"moof"):
            end = at
    return end


def _matroska_end(head: bytes) -> int:
    """End of the segment, 0 when it was written without a size."""

    def number(at: int) -> tuple[int, int]:
        """A variable-length size at `at`, and where it ends; -1 for 'unknown'."""
        first = head[at]
        length = 9 - first.bit_length()
        if first == 0 or at + length > len(head):
            return -1, at
        value = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        return (-1 if value == (1 << 7 * length) - 1 else value), at + length

    size, at = number(4)
    segment = at + size
    if size < 0 or head[segment : segment + 4] != b"\x18\x53\x80\x67" or segment + 5 > len(head):
        return 0
    size, at = number(segment + 4)
    return at + size if size >= 0 else 0
