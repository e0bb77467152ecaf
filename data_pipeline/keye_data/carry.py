"""What a batch takes with it from a worker to the trainer: pictures, and films trimmed to the packets that are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from keye_data.errors import DataError
from keye_data.packing import Document
from keye_data.sample import Media
from keye_data.stretch import Stretch, content
from keye_data.video import Part, trim

CARRY_BYTES = 128 << 20  # of one batch; hours of film stay in their shard, where the decoder reads them part by part


def carry(documents: Iterable[Document], room: int = CARRY_BYTES) -> None:
    """Reads and trims the media of `documents` in order until `room` is used up.

    Workers do this for the trainer, which has a GPU to feed. What cannot be read stays where it is as well: the decoder
    will find out, and the document is masked.
    """
    for document in documents:
        carried = []  # a new list: the sample's own may still stand in a buffer
        for media in document.media:
            parts = []
            for part in media.parts:
                taken = _take(media, part) if len(part.data) <= room else part
                room -= len(taken.data) if taken is not part else 0
                parts.append(taken)
            carried.append(replace(media, parts=parts))
        document.media = carried


def in_hand(kind: str, part: Part) -> Part:
    """The part without its shard: a picture's bytes, of a film the packets that its frames need. `kind` as in Media."""
    if not isinstance(part.data, Stretch):
        return part
    return Part(content(part.data), part.frames) if kind == "image" else Part(*trim(part.data, part.frames))


def _take(media: Media, part: Part) -> Part:
    try:
        return in_hand(media.kind, part)
    except (DataError, ValueError, IndexError, OSError):
        return part
