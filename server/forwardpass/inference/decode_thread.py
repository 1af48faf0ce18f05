"""One thread on which large messages are inflated and decoded, beside the thread that reads. Knows no message.

Work waits by group, such as a connection, and the groups take turns: one that sends many large messages waits for
itself. There is one thread, since decoding holds the interpreter for the most part.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable

logger = logging.getLogger(__name__)


class DecodeThread:
    """Thread-safe. The thread starts with the first work, and ends with the process."""

    def __init__(self, name: str = "decode") -> None:
        self._name = name
        self._groups: dict[Hashable, deque[Callable[[], None]]] = {}  # in the order of their turns
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, group: Hashable, work: Callable[[], None]) -> None:
        """Have `work` done once it is its group's turn. Never blocks; it is not bounded here what may wait."""
        with self._wake:
            self._groups.setdefault(group, deque()).append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def _next(self) -> Callable[[], None]:
        with self._wake:
            while not self._groups:
                self._wake.wait()
            group = next(iter(self._groups))
            waiting = self._groups.pop(group)
            work = waiting.popleft()
            if waiting:
                self._groups[group] = waiting  # behind all others
            return work

    def _serve(self) -> None:
        while True:
            work = self._next()
            try:
                work()
            except Exception:  # if this thread ended, later messages would wait forever
                logger.exception("a message could not be decoded")
            del work  # with the message, before the next one is waited for
