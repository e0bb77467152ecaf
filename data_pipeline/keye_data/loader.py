"""The loader: shard folders in, decoded micro-batches out, for ever, resumable to the batch.

Energon reads, blends, shuffles, encodes and packs in worker processes; this process decodes the pixels of each batch.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader
from megatron.energon.errors import FatalSampleError
from megatron.energon.metadataset.loader_interface import DatasetBlendMode

from keye_data import resume
from keye_data.accounting import Skipped
from keye_data.energon_source import FATAL, Encoder, WorkerBatch
from keye_data.errors import DataError
from keye_data.packing import Document
from keye_data.plain_state import from_plain, to_plain
from keye_data.processor import PATCH, Processor, media_grid
from keye_data.sample import IGNORE, Batch
from keye_data.settings import DataConfig
from keye_data.sources import open_sources
from keye_data.video import UnsupportedCodec

log = logging.getLogger(__name__)
STATE_VERSION = 2


class Loader:
    """An iterator of `Batch`es for data-parallel rank `rank` of `world_size`; ranks see different samples.

    Sources are drawn by weight, shuffled and packed into rows of settings.seq_length. The same arguments give the same
    batches, whatever the timing. Broken samples are skipped, named in the log and listed in Batch.bad, once each, also
    over a resume. It never ends, unless `repeat` is False: then every sample of every source is read once, whatever the
    weights, and the last batches may have fewer rows, or none where only skipped samples were left to tell of.
    Raises DataError for a missing or empty shard folder, and after max_failures_in_a_row broken samples.
    """

    def __init__(
        self,
        settings: DataConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        seed: int,
        repeat: bool = True,
    ) -> None:
        # The tokenizer's threads do not survive a fork, and say so on stderr in every worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.processor = processor
        self.repeat = repeat
        encoder = Encoder(processor, repeat)
        worker_config = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=settings.workers,
            seed_offset=seed,
            global_error_handler=encoder.lost,
            restore_error_handler=encoder.not_restored,
        )
        folders = open_sources(settings, worker_config)
        self.source_sizes = {str(folder.dataset.path): len(folder.dataset) for folder in folders}  # as in Batch.sources
        # What must be the same on both sides of a checkpoint for the order of the samples to go on.
        self._layout = {
            "rank": rank,
            "world_size": world_size,
            "workers": settings.workers,
            "seed": seed,
            "micro_batch_size": micro_batch_size,
            "seq_length": settings.seq_length,
            "packing_buffer": settings.packing_buffer if settings.packing else 1,
            "shuffle_buffer": settings.shuffle_buffer,
            "repeat": repeat,
            # not the paths: data may move between machines
            "sources": [[len(folder.dataset), folder.weight] for folder in folders],
        }
        dataset = encoder.build_train_datasets(
            datasets=folders,
            worker_config=worker_config,
            batch_size=micro_batch_size,
            batch_drop_last=repeat,
            packing_buffer_size=self._layout["packing_buffer"],
            shuffle_buffer_size=settings.shuffle_buffer,
            blend_mode=DatasetBlendMode.DATASET_WEIGHT if repeat else DatasetBlendMode.NONE,
            repeat=repeat,
        )
        self._loader = get_savable_loader(
            dataset,
            gc_collect_every_n_steps=10 if settings.workers else 0,  # it freezes the process's garbage: workers only
            watchdog_timeout_seconds=None,
        )
        self._batches: Iterator[WorkerBatch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")  # torch says it on machines without a GPU
                if self._batches is None:
                    self._batches = iter(self._loader)
                item = next(self._batches)
        except FatalSampleError as error:
            text = str(error)
            raise DataError(text.split(FATAL)[1] if FATAL in text else text) from error
        except StopIteration:
            if not self.repeat:
                raise
            raise DataError("the sources ran out of samples: every one was skipped") from None
        return self._decode(item)

    def _decode(self, item: WorkerBatch) -> Batch:
        begin = time.perf_counter()
        rows, bad = item.rows, list(item.skipped)
        for one in bad:
            log.warning("skipped, %s: %s", one.reason, one.message)
        patches = [torch.empty(0, 3, PATCH, PATCH, dtype=torch.uint8)]
        grids = [torch.empty(0, 2, dtype=torch.int64)]
        for document in rows.documents:
            broken = self._pixels(document, patches, grids)
            if broken:  # its tokens stay, so that all ranks agree on the shapes, and nothing is learned from them
                rows.targets[document.row, document.begin : document.end] = IGNORE
                bad.append(broken)
        return Batch(
            input_ids=torch.from_numpy(rows.input_ids),
            targets=torch.from_numpy(rows.targets),
            position_ids=torch.from_numpy(rows.position_ids),
            key_start=torch.from_numpy(rows.key_start),
            key_stop=torch.from_numpy(rows.key_stop),
            patches=torch.cat(patches),
            grid=torch.cat(grids),
            keys=[document.key for document in rows.documents],
            sources=[document.source for document in rows.documents],
            bad=bad,
            decode_ms=(time.perf_counter() - begin) * 1000,
        )

    def _pixels(self, document: Document, patches: list[torch.Tensor], grids: list[torch.Tensor]) -> Skipped | None:
        """Appends the pixels of a document's media, zeros for what cannot be decoded; returns what was wrong if anything."""
        broken = None
        for media in document.media:
            grid = media_grid(media)
            try:
                pixels, grid = self.processor.pixels(media)
            except UnsupportedCodec:
                raise  # a wrong data.video.backend, not a broken clip
            except DataError as error:
                log.warning("masked, %s: %s: %s", error.reason, document.key, error)
                message = f"{document.key}: {error}"
                broken = Skipped(document.key, document.source, error.reason, message, masked=True)
                pixels = torch.zeros(int(grid.prod(1).sum()), 3, PATCH, PATCH, dtype=torch.uint8)
            patches.append(pixels)
            grids.append(grid)
        return broken

    def state_dict(self) -> dict[str, Any]:
        """This rank's place in the data, behind the last batch returned: plain values and bytes only."""
        return {"version": STATE_VERSION, "layout": self._layout, "energon": to_plain(self._loader.save_state_rank())}

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Goes on behind the batch after which `state` was taken; before the first batch only.

        `state` is this rank's, or the list of all ranks' states, from which another number of ranks can go on as long as
        ranks x workers stays the same. DataError, with the valid choice, where it cannot.
        """
        if self._batches is not None:
            raise DataError("the loader has started already: load its state before the first batch")
        energon = from_plain(resume.pick(state, self._layout, STATE_VERSION)["energon"])
        self._loader.restore_state_rank(energon)
        if energon is not None and self._loader.num_workers:
            # Energon forgets how far each worker was behind its checkpoint, which matters when the next state is taken
            # before every worker has delivered again.
            self._loader._worker_sample_counters = [
                -1 if worker.state is None else worker.state.sample_index - 1 + worker.offset
                for worker in energon.worker_states
            ]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
