"""Where pixels are made: in this process, or by actors on the machines of a Ray cluster. The code, and every bit, is the same.

Both are used alike: `start` a picture or clip as soon as it is known, `finish` it when its pixels are needed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from keye_data import cluster
from keye_data.carry import in_hand
from keye_data.errors import DataError
from keye_data.pixels import PATCH, decode_pixels, media_grid
from keye_data.processor import Processor
from keye_data.sample import Media
from keye_data.settings import DecodeServiceConfig, VideoConfig
from keye_data.video import UnsupportedCodec

log = logging.getLogger(__name__)
UNDER_WAY = 2  # parts sent to an actor at a time: one in the making, one waiting; the rest wait here
ATTEMPTS = 3  # a part that ends its actor as often is taken for the cause
START_SECONDS = 120.0  # for all actors to be there
POLL = 0.5  # seconds
QUIET = 60.0  # seconds without a result after which the log says so
KEY = "data.decode_service"


class Decoder(Protocol):
    def start(self, media: Media) -> Any:
        """A handle for `finish`."""
        ...

    def finish(self, handle: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As pixels.decode_pixels: uint8 [P, 3, 14, 14] and int64 [N, 2]. DataError for what cannot be decoded."""
        ...

    def close(self) -> None: ...


class Here:
    """The decoder of this process."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def start(self, media: Media) -> Media:
        return media

    def finish(self, handle: Media) -> tuple[torch.Tensor, torch.Tensor]:
        return self.processor.pixels(handle)

    def close(self) -> None:
        pass


@dataclass
class _Request:
    """One part of a picture or clip; `result` is uint8 [p, 3, 14, 14], or what is wrong with it."""

    media: Media
    result: np.ndarray | DataError | None = None
    attempts: int = 0


@dataclass
class _Actor:
    handle: Any
    sent: dict[Any, _Request] = field(default_factory=dict)  # Ray's reference -> request, in the order of sending


class DecodeService:
    """Actors that decode. They start with the first clip. At most UNDER_WAY parts an actor are under way or waiting there.

    An actor that dies is replaced, and what it had not delivered is sent again. Films that still lie in a shard are trimmed
    here and sent: the actors need no access to the shards. One thread at a time may call. DataError for settings that cannot be.
    """

    def __init__(self, settings: DecodeServiceConfig, video: VideoConfig) -> None:
        self.settings, self.video = settings, video
        for name in ("actors", "cpus_per_actor"):
            if getattr(settings, name) < 1:
                raise DataError(f"{KEY}.{name}: {getattr(settings, name)} must be 1 or more")
        cluster.require_ray(f"{KEY}.address={settings.address}")
        self.actors: list[_Actor] = []
        self.waiting: deque[_Request] = deque()
        self.joined = False

    def start(self, media: Media) -> list[_Request]:
        if not self.actors:
            self._start()
        requests = [_Request(replace(media, parts=[part])) for part in media.parts]
        self.waiting.extend(requests)
        self._send()
        return requests

    def finish(self, handle: list[_Request]) -> tuple[torch.Tensor, torch.Tensor]:
        grids = [media_grid(request.media) for request in handle]
        patches = torch.empty(sum(int(grid.prod(1).sum()) for grid in grids), 3, PATCH, PATCH, dtype=torch.uint8)
        at = 0
        for i, request in enumerate(handle):
            self._wait_for(request)
            if isinstance(request.result, DataError):
                self.waiting = deque(one for one in self.waiting if not any(one is rest for rest in handle[i:]))
                raise request.result
            assert request.result is not None
            np.copyto(patches[at : at + len(request.result)].numpy(), request.result)
            at += len(request.result)
            request.result = None  # its place in Ray's store
        return patches, torch.cat(grids)

    def close(self) -> None:
        """Ends the actors, and leaves the cluster if it was joined here."""
        if not self.actors:
            return
        import ray

        for actor in self.actors:
            ray.kill(actor.handle)
        self.actors.clear()
        self.waiting.clear()
        if self.joined:
            ray.shutdown()

    # ---- inside

    def _start(self) -> None:
        import ray

        settings = self.settings
        cpus = settings.actors * settings.cpus_per_actor
        self.joined = cluster.connect(settings.address or "local", cpus, f"{KEY}.address")
        self.actors = [_Actor(self._new()) for _ in range(settings.actors)]
        ready = [actor.handle.ready.remote() for actor in self.actors]
        there, missing = ray.wait(ready, num_returns=len(ready), timeout=START_SECONDS)
        if missing:
            self.close()
            raise DataError(
                f"{KEY}: {len(there)} of {settings.actors} actors x {settings.cpus_per_actor} CPUs have started in "
                f"{START_SECONDS:.0f} s; set fewer, or give the cluster more CPUs"
            )

    def _new(self) -> Any:
        import ray

        return ray.remote(_Decoder).options(num_cpus=self.settings.cpus_per_actor).remote(self.settings.cpus_per_actor)

    def _send(self) -> None:
        while self.waiting:
            actor = min(self.actors, key=lambda one: len(one.sent))
            if len(actor.sent) >= UNDER_WAY:
                return
            request = self.waiting.popleft()
            try:
                (part,) = request.media.parts
                media = replace(request.media, parts=[in_hand(request.media.kind, part)])
            except DataError as error:
                request.result = error
                continue
            actor.sent[actor.handle.decode.remote(media, self.video)] = request

    def _wait_for(self, request: _Request) -> None:
        import ray

        since = time.monotonic()
        while request.result is None:
            under_way = [reference for actor in self.actors for reference in actor.sent]
            done, _ = ray.wait(under_way, num_returns=1, timeout=POLL)
            for actor in self.actors:
                for reference in [one for one in done if one in actor.sent]:
                    self._collect(actor, reference)
            self._send()
            if done:
                since = time.monotonic()
            elif time.monotonic() - since > QUIET:
                log.warning("%s: no actor has delivered for %.0f s", KEY, QUIET)
                since = time.monotonic()

    def _collect(self, actor: _Actor, reference: Any) -> None:
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError:
            raise  # a fault of ours, not of a clip: it would have been raised here as well
        except ray.exceptions.RayError as error:
            self._replace(actor, error)
            return
        actor.sent.pop(reference).result = answer.error() if isinstance(answer, _Refusal) else answer

    def _replace(self, actor: _Actor, error: Exception) -> None:
        """A new actor; all that the lost one has not delivered is sent again, its first part counted as the possible cause."""
        import ray

        lost, actor.sent = actor.sent, {}
        again: list[_Request] = []
        for reference, request in lost.items():
            try:
                answer = ray.get(reference, timeout=0)
                request.result = answer.error() if isinstance(answer, _Refusal) else answer
            except ray.exceptions.RayError:  # also what is not known yet
                again.append(request)
        log.warning("%s: an actor is lost (%s); another takes its place", KEY, str(error).splitlines()[0])
        ray.kill(actor.handle)
        actor.handle = self._new()
        if again:
            again[0].attempts += 1
            if again[0].attempts >= ATTEMPTS:
                text = f"a {again[0].media.kind}: ended its decoder {ATTEMPTS} times"
                again.pop(0).result = DataError(text, "ended its decoder")
        self.waiting.extendleft(reversed(again))


class _Decoder:
    """What runs in an actor."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def ready(self) -> bool:
        return True

    def decode(self, media: Media, video: VideoConfig) -> np.ndarray | _Refusal:
        try:
            return decode_pixels(media, video)[0].numpy()
        except DataError as error:
            return _Refusal(str(error), error.reason, isinstance(error, UnsupportedCodec))


@dataclass
class _Refusal:
    """A DataError on its way."""

    message: str
    reason: str
    unsupported: bool

    def error(self) -> DataError:
        return UnsupportedCodec(self.message) if self.unsupported else DataError(self.message, self.reason)
