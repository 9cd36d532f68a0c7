"""Keeps traces and plain module calls apart between threads.

While ``torch.export`` traces, it replaces ``nn.Module.__call__`` for the whole process: a network
that another thread runs meanwhile would end up in the trace. A capture therefore waits until no
other thread runs original modules through cvfast, and they wait for it. Programs call no modules
and need no gate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Busy(Exception):
    """The gate was not to be had alone."""


class Gate:
    """A lock that many threads share or one holds alone; whoever holds it alone may enter again.

    ``patience``: seconds to wait for the others. A forward that runs its sub-modules in threads of
    its own shares the gate until they are done, so they must not wait for it for ever.
    """

    def __init__(self, patience: float = 10.0) -> None:
        self._patience = patience
        self._condition = threading.Condition()
        self._sharers = 0
        self._owner: int | None = None
        self._mine = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """For running original modules."""
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._condition:
            # A thread that shares already must not wait for an owner who waits for it.
            if not self._depth():
                self._condition.wait_for(lambda: self._owner is None)
            self._sharers += 1
            self._mine.depth = self._depth() + 1
        try:
            yield
        finally:
            with self._condition:
                self._sharers -= 1
                self._mine.depth -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """For tracing. A thread that shares gives its share up until it has traced.

        Raises :class:`Busy`.
        """
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self.released():
            with self._condition:
                if not self._condition.wait_for(
                    lambda: self._owner is None and self._sharers == 0, self._patience
                ):
                    raise Busy(f"other threads ran modules for {self._patience} seconds")
                self._owner = me
            try:
                yield
            finally:
                with self._condition:
                    self._owner = None
                    self._condition.notify_all()

    @contextmanager
    def locked(self, lock: threading.RLock) -> Iterator[None]:
        """Hold ``lock``; while waiting for it, keep no tracing thread waiting."""
        with self.released():
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Give up the shares of this thread for a while."""
        shares = self._depth()
        with self._condition:
            self._sharers -= shares
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                if shares and self._owner != threading.get_ident():
                    self._condition.wait_for(lambda: self._owner is None)
                self._sharers += shares

    def wait(self) -> None:
        """Return once no other thread traces."""
        with self.shared():
            pass

    def _depth(self) -> int:
        depth: int = getattr(self._mine, "depth", 0)
        return depth


GATE = Gate()
