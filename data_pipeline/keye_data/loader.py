"""The loader: shard folders in, decoded micro-batches out, for ever, resumable to the batch.

Energon reads, blends, shuffles, encodes and packs in worker processes; a thread of this process decodes the pixels of each
batch, a few batches ahead of the step, or has them decoded by a service.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader
from megatron.energon.errors import FatalSampleError
from megatron.energon.metadataset.loader_interface import DatasetBlendMode
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint

from keye_data import resume
from keye_data.accounting import Skipped
from keye_data.decode_service import Decoder, DecodeService, Here
from keye_data.energon_source import FATAL, Encoder, WorkerBatch
from keye_data.errors import DataError
from keye_data.packing import Document
from keye_data.pixels import PATCH, media_grid
from keye_data.plain_state import from_plain, to_plain
from keye_data.prefetch import Prefetch
from keye_data.processor import Processor
from keye_data.sample import IGNORE, Batch
from keye_data.settings import DataConfig
from keye_data.sources import open_sources
from keye_data.video import UnsupportedCodec

log = logging.getLogger(__name__)
STATE_VERSION = 2
IN_PROCESS = threading.Lock()


class Loader:
    """An iterator of `Batch`es for data-parallel rank `rank` of `world_size`; ranks see different samples.

    Sources are drawn by weight, shuffled and packed into rows of settings.seq_length. The same arguments give the same
    batches, whatever the timing and data.prefetch. Broken samples are skipped, named in the log and listed in Batch.bad, once
    each, also over a resume. It never ends, unless `repeat` is False: then every sample of every source is read once, whatever the
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
        # by the names in Batch.sources
        self.source_sizes = {folder.dataset.subflavors["source"]: len(folder.dataset) for folder in folders}
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
            # Workers look back as far as the batches that wait to be handed out, besides those in their own queues.
            n_checkpoints=None if not settings.workers else 2 * (settings.workers + 1 + settings.prefetch),
        )
        self._batches: Iterator[WorkerBatch] | None = None
        self._decoder: Decoder = Here(processor)
        self._begun: deque[Callable[[], tuple[_Place, Batch]]] = deque()
        self._lookahead = 1
        if settings.decode_service.address is not None:
            self._decoder = DecodeService(settings.decode_service, settings.video)
            self._lookahead += settings.prefetch  # batches whose clips the service has been given
        self._place: _Place | None = None  # behind the last batch handed out
        self._origin: list[SavableDatasetCheckpoint] = []  # where each worker began
        self._origin_counters: list[int] = []
        self._ahead: Prefetch[tuple[_Place, Batch]] = Prefetch(self._make, settings.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._place, batch = next(self._ahead)
        return batch

    def _make(self) -> tuple[_Place, Batch]:
        """The next batch, and the place behind it."""
        while len(self._begun) < self._lookahead:
            try:
                self._begun.append(self._begin())
            except (DataError, StopIteration) as error:
                if not self._begun:
                    raise
                self._begun.append(partial(_raise, error))  # in its turn
                break
        return self._begun.popleft()()

    def _begin(self) -> Callable[[], tuple[_Place, Batch]]:
        """What finishes the batch that the workers have next; its clips are given to the decoder now."""
        # Without workers Energon runs here, and it bears one loader of a process at a time.
        with IN_PROCESS if not self._loader.num_workers else nullcontext():
            item, place = self._next_item(), self._place_now()
        handles = [[self._decoder.start(media) for media in document.media] for document in item.rows.documents]
        return lambda: (place, self._decode(item, handles))

    def _next_item(self) -> WorkerBatch:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")  # torch says it on machines without a GPU
                if self._batches is None:
                    if self._loader.num_workers:
                        origin = self._loader.dataset.get_initial_checkpoint()
                        fresh = SavableDatasetCheckpoint(state=None, offset=0)
                        self._origin = origin or [fresh] * self._loader.num_workers
                        self._origin_counters = list(self._loader._worker_sample_counters)
                    self._batches = iter(self._loader)
                item = next(self._batches)
        except FatalSampleError as error:
            text = str(error)
            raise DataError(text.split(FATAL)[1] if FATAL in text else text) from error
        except StopIteration:
            if not self.repeat:
                raise
            raise DataError("the sources ran out of samples: every one was skipped") from None
        return item

    def _decode(self, item: WorkerBatch, handles: list[list[Any]]) -> Batch:
        """`handles`: of the decoder, for each document those of its media."""
        begin = time.perf_counter()
        rows, bad = item.rows, list(item.skipped)
        for one in bad:
            log.warning("skipped, %s: %s", one.reason, one.message)
        patches = [torch.empty(0, 3, PATCH, PATCH, dtype=torch.uint8)]
        grids = [torch.empty(0, 2, dtype=torch.int64)]
        for document, own in zip(rows.documents, handles):
            broken = self._pixels(document, own, patches, grids)
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

    def _pixels(
        self, document: Document, handles: list[Any], patches: list[torch.Tensor], grids: list[torch.Tensor]
    ) -> Skipped | None:
        """Appends the pixels of a document's media, zeros for what cannot be decoded; returns what was wrong if anything."""
        broken = None
        for media, handle in zip(document.media, handles):
            grid = media_grid(media)
            try:
                pixels, grid = self._decoder.finish(handle)
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
        return {"version": STATE_VERSION, "layout": self._layout, "energon": self._energon_state()}

    def _place_now(self) -> _Place:
        """Where Energon stands. Its workers can be asked for an earlier place later on; without workers it is written down."""
        if not self._loader.num_workers:
            return _Place([], 0, to_plain(self._loader.save_state_rank()))
        return _Place(list(self._loader._worker_sample_counters), self._loader._next_worker_id)

    def _energon_state(self) -> Any:
        """Energon's save_state_rank as of the last batch handed out, which batches have been made behind since."""
        place = self._place
        if place is None:
            return to_plain(self._loader.save_state_rank())
        if place.written is not None:
            return place.written
        workers = self._loader._worker_command("get_checkpoint", place.counters)
        # A worker still on its way to its first batch may answer before it stands where it was told to begin.
        begun = [now != origin for now, origin in zip(place.counters, self._origin_counters)]
        state = SavableDataLoaderState(
            worker_states=[one if has else origin for one, has, origin in zip(workers, begun, self._origin)],
            next_worker_id=place.next_worker,
            micro_batch_size=self._loader._get_batch_size(),
        )
        return to_plain(state)

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

    @property
    def worker_pids(self) -> list[int]:
        """Of the worker processes that are there now."""
        return [worker.pid for worker in getattr(self._loader._iterator, "_workers", ())]

    def close(self) -> None:
        """Ends the thread, the worker processes and the service's actors."""
        ended = self._ahead.close()
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
        if not ended:  # it waited for a worker that hangs, and now there is none
            self._ahead.close()
        self._decoder.close()


def _raise(error: BaseException) -> Any:
    raise error


@dataclass
class _Place:
    """How many batches each worker has delivered, and whose turn is next; or all that Energon writes down."""

    counters: list[int]
    next_worker: int
    written: Any = None
