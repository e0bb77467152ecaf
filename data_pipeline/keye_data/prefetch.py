"""Work done ahead: a thread that makes the next few items while the last one is in use."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from keye_data.errors import DataError

T = TypeVar("T")
PATIENCE = 30.0  # seconds that `close` gives an item in the making


class Prefetch(Iterator[T], Generic[T]):
    """The results of `make()`, a bound method, called again and again: in a thread, at most `ahead` of them waiting.

    Results come in their order, and so does what `make` raises, at the place where it was raised; the call after that goes on
    with `make`. The first result is made by the caller's own thread, so that processes are forked there. ahead = 0 leaves all
    of it to the caller. DataError for a negative one.
    """

    def __init__(self, make: Callable[[], T], ahead: int) -> None:
        if ahead < 0:
            raise DataError(f"data.prefetch: {ahead} batches ahead; it must be 0 or more")
        self._make: Any = weakref.WeakMethod(make)  # the thread keeps nobody alive who has forgotten to close
        self._ahead = ahead
        self._shelf: _Shelf | None = None
        self._first = True
        self._finalizer: weakref.finalize | None = None

    def __next__(self) -> T:
        if self._ahead == 0 or self._first:
            self._first = False
            return self._make()()
        if self._shelf is None:
            self._shelf = shelf = _Shelf(self._ahead)
            shelf.thread = threading.Thread(target=_work, args=(self._make, shelf), name="prefetch", daemon=True)
            self._finalizer = weakref.finalize(self, shelf.close)  # also when the interpreter exits
            shelf.thread.start()
        result, error = self._shelf.take()
        if error is None:
            return result
        self.close()  # the thread has ended there
        try:
            raise error
        finally:
            del error  # or the traceback's frames would keep each other alive

    def close(self, patience: float = PATIENCE) -> bool:
        """Throws away what waits and ends the thread, after the item it is making -> False if that takes longer than `patience`."""
        if self._shelf is None:
            return True
        ended = self._shelf.close(patience)
        if ended:
            self._shelf = None
            if self._finalizer is not None:
                self._finalizer.detach()
        return ended


class _Shelf:
    """Results that wait, between the thread that makes them and the one that takes them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.items: deque[tuple[Any, BaseException | None]] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.thread: threading.Thread | None = None

    def wait_for_room(self) -> bool:
        """False when nothing is wanted any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.room)
            return not self.closed

    def put(self, result: Any, error: BaseException | None) -> None:
        with self.changed:
            if not self.closed:
                self.items.append((result, error))
            self.changed.notify_all()

    def take(self) -> tuple[Any, BaseException | None]:
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            item = self.items.popleft()
            self.changed.notify_all()
            return item

    def close(self, patience: float = PATIENCE) -> bool:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()
        thread = self.thread
        if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
            thread.join(patience)
            return not thread.is_alive()
        return True


def _work(method: Any, shelf: _Shelf) -> None:
    while shelf.wait_for_room():
        make = method()
        if make is None:
            return
        try:
            result = make()
        except BaseException as error:  # the taker raises it
            shelf.put(None, error)
            return
        del make
        shelf.put(result, None)
        del result
