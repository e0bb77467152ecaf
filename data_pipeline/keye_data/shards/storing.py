"""One picture or clip -> its members in the shard and what the index says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keye_data.errors import DataError
from keye_data.images import decode_image
from keye_data.shards.media import MediaFile
from keye_data.shards.options import Options
from keye_data.shards.reencode import reencode
from keye_data.video.stored import TABLE, StoredClip, members


def store(
    name: str, kind: str, file: MediaFile, options: Options, entry: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """The (member name, bytes) of one file; `entry` becomes its entry in the index.

    Pictures are decoded once and clips scanned, so that what is damaged is known now. DataError says what is wrong.
    """
    try:
        yield from _store(name, kind, file, options, entry)
    except DataError:
        raise
    # whatever else decoders say about broken files
    except (ValueError, IndexError, RuntimeError, EOFError, ArithmeticError) as error:
        raise DataError(f"{type(error).__name__}: {error}", "damaged media") from error


def _store(
    name: str, kind: str, file: MediaFile, options: Options, entry: dict[str, Any]
) -> Iterator[tuple[str, bytes]]:
    entry |= {"name": name, "kind": kind, "sha256": file.sha256()}
    if kind == "image":
        data = file.read()
        height, width, _ = decode_image(data).shape
        entry |= {"bytes": len(data), "width": width, "height": height}
        yield name, data
        return
    source = file.source if options.reencode is None else reencode(file.source, options.reencode)
    entry["bytes"] = 0
    for suffix, data in members(source, segment_seconds=options.segment_seconds):
        if suffix == TABLE:
            info = StoredClip({f"{name}.{TABLE}": data}, name).info
            entry |= {"width": info.width, "height": info.height, "codec": info.codec, "frames": info.n_frames}
            entry["seconds"] = round(info.duration, 3)
        else:
            entry["bytes"] += len(data)
        yield (f"{name}.{suffix}" if suffix else name), data


def store_as_it_is(name: str, kind: str, file: MediaFile, entry: dict[str, Any], error: DataError) -> bytes:
    """The bytes of a damaged file, for the loader to find; `entry` says what is wrong."""
    data = file.read()
    entry.clear()
    entry |= {"name": name, "kind": kind, "sha256": file.sha256(), "bytes": len(data), "problem": str(error)}
    return data
