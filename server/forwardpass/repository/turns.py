"""Changes of one model take turns; those of different models do not wait for each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """A lock for each name that is in use. Thread-safe; a thread that has a name's turn may take it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[
            str, tuple[threading.RLock, int]
        ] = {}  # by name: its lock, and how many have it or wait for it

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Block until it is this thread's turn to change `name`."""
        with self._lock:
            lock, users = self._used.get(name) or (threading.RLock(), 0)
            self._used[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._used.pop(name)
                if users > 1:
                    self._used[name] = (lock, users - 1)
