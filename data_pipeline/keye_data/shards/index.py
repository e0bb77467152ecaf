"""Energon's index of a folder of shards, and lists joined from their parts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from pathlib import Path

from keye_data.errors import DataError
from keye_data.shards.reports import SAMPLES

DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def join(parts: list[Path], target: Path) -> None:
    """One file out of several, in their order."""
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, out)


def write_index(folder: Path, tars: dict[str, str]) -> None:
    """What `energon prepare` writes for the shards (name -> sha256): sample counts and offsets, all in the training split.

    DataError if it finds other samples in them than samples.jsonl lists.
    """
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    logging.getLogger("megatron.energon").setLevel(logging.WARNING)
    meta = folder / ".nv-meta"
    shutil.rmtree(meta, ignore_errors=True)  # of a run that ended here
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder,
            list(tars),
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=min(4, len(tars), os.cpu_count() or 1),
        )
    (meta / "dataset.yaml").write_text(DATASET_YAML, encoding="utf-8")
    # Energon draws an identity at random; the same shards are the same data set.
    digest = hashlib.sha256("".join(tars.values()).encode()).digest()[:16]
    (meta / "index.uuid").write_text(str(uuid.UUID(bytes=digest, version=4)))
    with (folder / SAMPLES).open("rb") as lines:
        listed = Counter(json.loads(line)["shard"] for line in lines)
    found = json.loads((meta / ".info.json").read_bytes())["shard_counts"]
    for name in tars:
        if found.get(name) != listed[name]:
            raise DataError(f"{folder / name}: {listed[name]} samples were written, {found.get(name)} can be read")
