"""Values read from files, and again when these change: certificates, tokens. The last valid value stays in use.

A change is detected by the files' modification times, sizes and inode numbers, following links: also when a mounted
secret is replaced by switching a symbolic link.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from forwardpass.errors import SettingsError

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = tuple[tuple[int, int, int] | None, ...]


class Watched(Generic[T]):
    """Thread-safe. `value` is always the last one that could be read.

    - A failed read is logged and counted once for each state of the files; the next change is tried again.
    - Files that change while they are read are read again at the next look.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        read: Callable[[], T],
        every: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read for the first time. `read` raises SettingsError for contents that can't be used, and so does this.

        `every`: seconds between two checks of the files, at least.
        """
        self._what = what
        self._paths = tuple(paths)
        self._read = read
        self._every = every
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._state()
        self._next = clock() + every
        self.value = read()
        self.reloads = 0
        self.failures = 0

    def look(self) -> bool:
        """Read the files again if they changed. Returns whether `value` is another one now."""
        if self._every and self._clock() < self._next:
            return False
        with self._lock:
            self._next = self._clock() + self._every
            state = self._state()
            if state == self._seen:
                return False
            return not self._read_again(state, "changed")

    def read_again(self) -> str:
        """Read the files even if unchanged. Returns the reason they can't be used; empty: they are in use."""
        with self._lock:
            return self._read_again(self._state(), "was read again")

    def _read_again(self, state: State, why: str) -> str:
        """`state`: that of the files, before they are read. Lock held."""
        self._seen = state
        try:
            self.value = self._read()
        except SettingsError as error:
            self.failures += 1
            logger.error("%s %s and cannot be used; the last good one stays: %s", self._what, why, error)
            return str(error)
        self.reloads += 1
        logger.info("%s %s and is in use", self._what, why)
        return ""

    def _state(self) -> State:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)


def read_bytes(path: Path, what: str) -> bytes:
    """A file's content. Raises SettingsError naming its purpose and the reason it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{what}: {path} cannot be read: {error.strerror}") from None
