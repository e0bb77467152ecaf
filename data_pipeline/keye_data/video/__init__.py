"""Video: one contract, several decoders.

`probe` says what a clip holds, `decode` returns exactly the frames asked for, `scan` is the packet table, `trim` cuts a clip
to the packets that some frames need; `members` and `StoredClip` write a clip into a shard and read it there. A source is a path or
the bytes of a container.

The contract: the index of a frame is its rank by presentation time; its time is (pts - first pts) * time base, in seconds from 0;
frames before the start of an edit list do not exist; rotation and mirrors of the container are applied; colours follow the
matrix that the stream names (BT.601 where it names none); pixels count as square. Whatever is wrong with a clip is a `DataError`.
"""

from __future__ import annotations

from .api import BACKENDS, Info, decode, decode_chunks, probe
from .container import MAX_BYTES, MAX_PIXELS, MAX_SIDE, DamagedVideo, Source, UnsupportedCodec
from .packets import PacketTable, scan
from .stored import Part, StoredClip, members
from .trim import trim

__all__ = [
    "BACKENDS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "DamagedVideo",
    "Info",
    "PacketTable",
    "Part",
    "Source",
    "StoredClip",
    "UnsupportedCodec",
    "decode",
    "decode_chunks",
    "members",
    "probe",
    "scan",
    "trim",
]
