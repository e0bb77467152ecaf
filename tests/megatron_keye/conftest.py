"""Generated data for the runs of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from keye_data.shards import build_shards
from keye_data.synthetic import generate


@pytest.fixture(scope="session")
def clip_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated clips, in shards."""
    folder = tmp_path_factory.mktemp("clips")
    generate(folder / "source", 120)
    build_shards(folder / "source", folder / "shards", samples_per_shard=40)
    return folder / "shards"
