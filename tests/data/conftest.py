"""Loaders for the tests of this folder."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from keye_data.loader import Loader
from keye_data.processor import Processor
from keye_data.settings import DataConfig, SourceConfig, VideoConfig


@pytest.fixture
def open_loader(tokenizer):
    """open_loader(*sources, rank=0, world_size=1, micro_batch_size=1, seed=3, repeat=True, **fields of DataConfig).

    Sources are shard folders or SourceConfigs. Rows, frames and buffers are small, and no worker is started, unless said
    otherwise. Every loader is closed when the test ends, if not before.
    """
    with ExitStack() as opened:

        def make(
            *sources: str | Path | SourceConfig, rank=0, world_size=1, micro_batch_size=1, seed=3, repeat=True, **fields
        ) -> Loader:
            small = {"seq_length": 160, "packing_buffer": 4, "shuffle_buffer": 4, "workers": 0}
            settings = DataConfig(
                tokenizer="-",
                sources=[one if isinstance(one, SourceConfig) else SourceConfig(str(one)) for one in sources],
                **{"video": VideoConfig(min_frame_tokens=4, max_frame_tokens=6), **small, **fields},
            )
            loader = Loader(
                settings,
                Processor(tokenizer, settings),
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                seed=seed,
                repeat=repeat,
            )
            return opened.enter_context(closing(loader))

        yield make
