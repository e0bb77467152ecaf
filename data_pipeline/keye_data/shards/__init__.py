"""Sources -> WebDataset shards with Energon's index.

A sample is the members `{key}.json` (the conversation) and its media under the names that the conversation uses: `{key}.0.png`;
a clip is `{key}.1.mp4` with `{key}.1.mp4.packets`, its packet table, or, where it is long, `{key}.1.mp4.000.mp4`,
`{key}.1.mp4.001.mp4`, ..., cut where decoding can start. Beside the shards lie samples.jsonl (a line a sample: key, shard, where it
is from, digests, sizes, durations, tokens), duplicates.json, and bad.jsonl where samples were left out.
The same source gives the same shards, byte for byte, however many processes or machines wrote them.
"""

from __future__ import annotations

from .build import Summary, build, build_shards
from .options import Options, Reencode

__all__ = ["Options", "Reencode", "Summary", "build", "build_shards"]
