"""What Energon runs in the loader's workers: read members, encode, pack, collate; broken samples are noted, not fatal."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.energon import Cooker, CrudeWebdataset, DefaultTaskEncoder, Sample, SkipSample, WorkerConfig, stateless
from megatron.energon.edataclass import edataclass
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import FilteredSample
from megatron.energon.source_info import SourceInfo
from megatron.energon.wrappers import PackingDataset

from keye_data.accounting import Skipped
from keye_data.carry import carry
from keye_data.conversation import MALFORMED
from keye_data.errors import DataError
from keye_data.members import find_members
from keye_data.one_epoch import Once, ThenRest
from keye_data.packing import PackedRows, best_fit, collate, rows_to_send
from keye_data.processor import Processor
from keye_data.sample import EncodedSample
from keye_data.stretch import Stretch
from keye_data.worker_life import live_as_long_as_the_trainer

log = logging.getLogger(__name__)
READ = "read"  # the one member of a sample that has not been read yet: the function that reads it


@edataclass
class CookedSample(Sample):
    """A sample that can be read from its shard."""

    read: Callable[[], tuple[str, dict[str, Stretch]]]  # -> shard and key, members
    source: str


@edataclass
class EncodedItem(Sample):
    encoded: EncodedSample


@edataclass
class PackedItem(Sample):
    samples: list[EncodedSample]


@edataclass
class WorkerBatch(Sample):
    """What a worker sends: packed rows, and the samples it has skipped since the last."""

    rows: PackedRows
    skipped: list[Skipped] = field(default_factory=list)


class ShardFolder(CrudeWebdataset):
    """A folder of shards that is read lazily, and whose damaged parts do not end the run."""

    def __init__(self, path: Path, worker_config: WorkerConfig) -> None:
        super().__init__(
            EPath(path),
            split_part="train",
            training=True,
            worker_config=worker_config,
            subflavors={"source": str(path)},
            decoder=None,
        )

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset = super().build(worker_rotation_offset)
        reader = dataset._find_wrapped_dataset(WebdatasetSampleLoaderDataset)
        reader.join_readers = [_LazyReader(inner) for inner in reader.join_readers]
        return dataset


class _LazyReader:
    """Samples by index, read only when they are encoded, and then without their films: buffers hold pointers."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> FilteredSample:
        shard = self._shard(index)
        source = SourceInfo(dataset_path=self.reader.base_path, index=index, shard_name=shard, file_names=())
        return FilteredSample(
            __key__=f"{shard}/sample {index}",
            __shard__=shard,
            __restore_key__=("Webdataset", index),
            __sources__=(source,),
            **{READ: partial(self._read, index)},
        )

    def _read(self, index: int) -> tuple[str, dict[str, Stretch]]:
        """(shard and key, where the members lie). DataError for what a cut or overwritten tar no longer holds."""
        pointer = self.reader._get_itar_sample_pointer(index)
        path = str(self.reader.tar_filepaths[pointer.tar_file_id])
        key, members = find_members(path, pointer.byte_offset, pointer.byte_size)
        return f"{self.reader.tar_filenames[pointer.tar_file_id]}/{key}", members

    def _shard(self, index: int) -> str:
        return self.reader.tar_filenames[self.reader._get_itar_sample_pointer(index).tar_file_id]


@stateless
def cook(sample: dict[str, Any]) -> CookedSample:
    return CookedSample(
        __key__=sample["__key__"],
        __restore_key__=sample["__restore_key__"],
        __subflavors__=sample["__subflavors__"],
        __sources__=sample["__sources__"],
        read=sample[READ],
        source=sample["__subflavors__"]["source"],
    )


class Encoder(DefaultTaskEncoder):
    """Energon's hooks around a Processor. One copy lives in each worker."""

    cookers = (Cooker(cook),)
    decoder = None  # Energon's own is not frame-exact

    def __init__(self, processor: Processor, repeat: bool = True) -> None:
        super().__init__()
        self.repeat = repeat
        self.processor = processor
        self.settings = processor.settings
        self.skipped: list[Skipped] = []
        self.failures_in_a_row = 0
        self.packer: Any = None  # Energon's, once it is built
        self.sources_left = True

    def _load_dataset(self, dataset: Any, worker_rotation_offset: int, worker_config: WorkerConfig) -> Any:
        loaded = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        return loaded if self.repeat else Once(loaded, worker_config)

    def build_batch(self, dataset: Any, *, worker_config: WorkerConfig, **options: Any) -> Any:
        dataset = super().build_batch(dataset, worker_config=worker_config, **options)
        self.packer = dataset._find_wrapped_dataset(PackingDataset)
        fill = self.packer._fill_reading_buffer

        def quietly(source: Any, log_progress: bool = False) -> bool:
            """Without a progress bar per worker; remembers that the sources have ended."""
            self.sources_left = fill(source)
            return self.sources_left

        self.packer._fill_reading_buffer = quietly
        return dataset if self.repeat else ThenRest(dataset, self._rest, worker_config)

    def _rest(self) -> WorkerBatch | None:
        """Samples skipped behind the last batch of an epoch."""
        return self._batch("rest", []) if self.skipped else None

    def lost(self, error: Exception, sample: Any, sources: Any = None) -> None:
        """Energon's handler for what goes wrong outside encoding: it drops `sample`, or the samples in that list."""
        for key, source in _names(sample, sources or ()):
            message = f"{key}: dropped by Energon: {type(error).__name__}: {error}"
            self.skipped.append(Skipped(key, source, "dropped by Energon", message))

    @stateless
    def encode_sample(self, sample: CookedSample) -> EncodedItem:
        live_as_long_as_the_trainer()
        name = f"{sample.source}/{sample.__key__}"
        try:
            name, members = _read(sample, name)
            encoded = self.processor.encode(_conversation(members, name), members, name, sample.source)
        except DataError as error:
            raise self._skip(name, sample.source, error.reason, str(error)) from error
        except Exception as error:
            log.exception("%s: unexpected error", name)
            message = f"{name}: {type(error).__name__}: {error}"
            raise self._skip(name, sample.source, "unexpected error", message) from error
        self.failures_in_a_row = 0
        return EncodedItem.derive_from(sample, encoded=encoded)

    def not_restored(self, error: Exception, sample: Any, sources: Any = None) -> None:
        """Energon's handler for a sample that a saved buffer held and that cannot be read again: no order could go on."""
        text = self.skipped[-1].message if self.skipped else f"{type(error).__name__}: {error}"
        text = f"the data is not what it was when the checkpoint was written; put it back as it was: {text}"
        raise FatalSampleError(FATAL + text + FATAL) from error

    def _skip(self, key: str, source: str, reason: str, message: str) -> Exception:
        self.skipped.append(Skipped(key, source, reason, message))
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.settings.max_failures_in_a_row:
            text = f"{self.failures_in_a_row} samples in a row could not be used (data.max_failures_in_a_row); the last: {message}"
            return FatalSampleError(FATAL + text + FATAL)
        return SkipSample()

    def select_samples_to_pack(self, samples: list[EncodedItem]) -> list[list[EncodedItem]]:
        if not self.settings.packing:
            return [[sample] for sample in samples]
        lengths = [len(sample.encoded) for sample in samples]
        rows = best_fit(lengths, self.settings.seq_length)
        if self.sources_left:  # the rest waits in the buffer, and in its saved state, for samples that fit better
            rows = rows_to_send(rows, lengths, self.settings.seq_length)
            sent = {i for row in rows for i in row}
            self.packer._reading_buffer.extend([sample for i, sample in enumerate(samples) if i not in sent])
        return [[samples[i] for i in row] for row in rows]

    @stateless
    def pack_selected_samples(self, samples: list[EncodedItem]) -> PackedItem:
        return PackedItem.derive_from(samples[0], samples=[sample.encoded for sample in samples])

    @stateless
    def batch(self, samples: list[PackedItem]) -> WorkerBatch:
        return self._batch(samples[0].__key__, samples)

    def _batch(self, key: str, samples: list[PackedItem]) -> WorkerBatch:
        rows = collate(
            [item.samples for item in samples], self.settings.seq_length, self.processor.tokenizer.pad_token_id
        )
        carry(rows.documents)
        skipped, self.skipped = self.skipped, []
        return WorkerBatch(__key__=key, __restore_key__=(), rows=rows, skipped=skipped)


FATAL = "\x1f"  # marks our sentence inside the wrapped traceback that a worker's exception becomes


def _names(sample: Any, sources: Iterable[SourceInfo]) -> list[tuple[str, str]]:
    """(key, source) of every sample in what one of Energon's stages was given."""
    if isinstance(sample, list):
        return [name for one in sample for name in _names(one, getattr(one, "__sources__", None) or ())]
    encoded = getattr(sample, "samples", None) or [getattr(sample, "encoded", None)]
    if encoded[0] is not None:
        return [(one.key, one.source) for one in encoded]
    return [(f"{one.dataset_path}/{one.shard_name}/sample {one.index}", str(one.dataset_path)) for one in sources]


def _read(sample: CookedSample, name: str) -> tuple[str, dict[str, Stretch]]:
    try:
        key, members = sample.read()
    except DataError as error:
        raise DataError(f"{name}: {error}", error.reason) from error
    return f"{sample.source}/{key}", members


def _conversation(members: dict[str, Stretch], name: str) -> dict[str, Any]:
    try:
        conversation = json.loads(members["json"].read())
    except KeyError as error:
        raise DataError(f"{name}: it has no .json member", MALFORMED) from error
    except DataError as error:
        raise DataError(f"{name}: {error}", error.reason) from error
    except ValueError as error:
        raise DataError(f"{name}: its .json member is not JSON: {error}", MALFORMED) from error
    if not isinstance(conversation, dict):
        raise DataError(f"{name}: its .json member is not an object", MALFORMED)
    return conversation
