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
        for i, media in enumerate(document.media):
            parts = []
            for part in media.parts:
                taken = _take(media, part) if room > 0 and _size(part) <= room else part
                room -= _size(taken) if taken is not part else 0
                parts.append(taken)
            document.media[i] = replace(media, parts=parts)


def _take(media: Media, part: Part) -> Part:
    if not isinstance(part.data, Stretch):
        return part
    try:
        return Part(content(part.data), part.frames) if media.kind == "image" else Part(*trim(part.data, part.frames))
    except (DataError, ValueError, IndexError, OSError):
        return part


def _size(part: Part) -> int:
    return len(part.data)
