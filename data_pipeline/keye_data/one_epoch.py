"""Energon datasets that end after one pass, also when they are resumed close to their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.wrappers.base import BaseWrapperDataset


class Once(BaseWrapperDataset):
    """The samples of a source once. Energon's own would start again where a state is restored after its last sample."""

    _savable_fields = ("_done",)

    def __init__(self, dataset: Any, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._done = False

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Any]:
        if not self._done:
            yield from self.dataset
        self._done = True

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


class ThenRest(BaseWrapperDataset):
    """The batches, and behind the last of them what `rest` has left over, if anything."""

    def __init__(self, dataset: Any, rest: Callable[[], Any], worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self.rest = rest

    def reset_state_own(self) -> None:
        pass

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Any]:
        yield from self.dataset
        if (rest := self.rest()) is not None:
            yield rest

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}
