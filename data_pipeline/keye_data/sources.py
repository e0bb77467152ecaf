"""The sources of a recipe, checked and opened."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.energon import WorkerConfig
from megatron.energon.metadataset.loader_interface import LoadedDataset

from keye_data.blend import shares
from keye_data.energon_source import ShardFolder
from keye_data.errors import DataError
from keye_data.settings import DataConfig

INDEX_ENTRY = 8  # bytes per offset in a .tar.idx


def open_sources(settings: DataConfig, worker_config: WorkerConfig) -> list[LoadedDataset]:
    """The folders of settings.sources with their shares. DataError naming the folder at fault and what to do."""
    if not settings.sources:
        raise DataError("data.sources is empty: name at least one folder made by tools/build_shards.py")
    readers = worker_config.world_size * max(1, worker_config.num_workers)
    seen: set[Path] = set()
    loaded = []
    for source, share in zip(settings.sources, shares(settings.sources, settings.long_short_ratio)):
        folder = Path(source.path).expanduser()
        if folder.resolve() in seen:
            raise DataError(f"data.sources: {source.path} is listed twice; give it one weight")
        seen.add(folder.resolve())
        samples = _check(folder, source.path)
        if samples < readers:
            raise DataError(
                f"data.sources: {source.path} has {samples} samples for {readers} readers (data-parallel ranks x data.workers); "
                "use fewer workers or ranks, or more samples"
            )
        loaded.append(LoadedDataset(dataset=ShardFolder(folder, worker_config), weight=share))
    return loaded


def _check(folder: Path, name: str) -> int:
    """How many samples the folder holds."""
    build = f"build it with `python tools/build_shards.py SOURCE --out {name}`"
    if not folder.is_dir():
        raise DataError(f"data.sources: the shard folder {name} does not exist; {build}")
    try:
        counts = json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
        samples = sum(counts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data.sources: {name} is no shard folder (no readable index); {build}") from error
    if missing := [shard for shard in counts if not (folder / shard).is_file()]:
        raise DataError(f"data.sources: {name} lacks {len(missing)} of its shards, first {missing[0]}; {build}")
    for shard, count in counts.items():
        index = folder / f"{shard}.idx"
        if not index.is_file() or index.stat().st_size != INDEX_ENTRY * (count + 1):
            raise DataError(f"data.sources: {name}: {index.name} is missing or damaged; {build}")
    if samples == 0:
        raise DataError(f"data.sources: {name} is empty; {build}")
    return samples
