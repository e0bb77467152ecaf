"""Shards as other tools write them, clips without packet tables: the same batches, only slower."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch

from keye_data.shards import build_shards
from keye_data.shards.index import write_index


def without_tables(shards: Path) -> int:
    """Takes the packet tables out of the shards; returns how many there were."""
    count, tars = 0, {}
    for path in sorted(shards.glob("*.tar")):
        out = io.BytesIO()
        with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
            for info in old:
                if info.name.endswith(".packets"):
                    count += 1
                else:
                    new.addfile(info, old.extractfile(info))
        path.write_bytes(out.getvalue())
        tars[path.name] = "0" * 64
    for index in shards.glob("*.idx"):
        index.unlink()
    write_index(shards, tars)
    return count


def test_clips_without_tables_give_the_same_batches(open_loader, make_clip, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    with (source / "data.jsonl").open("w") as lines:
        for i in range(5):
            (source / f"{i}.mp4").write_bytes(make_clip(20 + i, seed=i))
            content = [{"type": "video", "video": f"{i}.mp4"}, {"type": "text", "text": "What?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Clip {i}."}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    build_shards(source, tmp_path / "shards", samples_per_shard=3)
    runs = []
    for old in (False, True):
        if old:
            assert without_tables(tmp_path / "shards") == 5
        loader = open_loader(tmp_path / "shards", seq_length=512, packing_buffer=64, shuffle_buffer=100, seed=1)
        runs.append([next(loader) for _ in range(3)])
        loader.close()
    for new, bare in zip(*runs):
        assert new.keys == bare.keys and new.skipped == bare.skipped == {}
        for name in ("input_ids", "targets", "patches", "grid"):
            assert torch.equal(getattr(new, name), getattr(bare, name)), name
