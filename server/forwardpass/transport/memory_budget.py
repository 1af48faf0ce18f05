"""Bounds the bytes that clients make a transport keep: messages that are not read yet, answers that have not left.

Over all connections they are at most the limit; and one connection may hold as much as is free for the others, so that
one that reads nothing gets half of the room, and a second one half of what is left. No I/O. Thread-safe.
"""

from __future__ import annotations

import threading
from typing import Final

from forwardpass.errors import Overloaded, Reason

COUNTED_FROM: Final = 4096  # bytes of an answer; the number of calls bounds smaller ones
RETRY_AFTER: Final = 0.1  # seconds


def no_room(nbytes: int) -> Overloaded:
    """The error for a call whose answer has no room."""
    return Overloaded(
        f"there is no room for an answer of {nbytes} bytes among those that its connection has asked for and not read; "
        "read them first, or have fewer calls under way",
        reason=Reason.SERVER_BYTES,
        retry_after=RETRY_AFTER,
    )


class MemoryBudget:
    """Bytes held over all connections."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.lock = threading.Lock()


class Share:
    """What one connection holds of a budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.nbytes = 0
        self._budget = budget

    def take(self, more: int) -> bool:
        """Count `more` bytes if there is room for them. One answer alone always has room where nothing else is held."""
        budget = self._budget
        with budget.lock:
            after = budget.nbytes + more
            if budget.nbytes and after + (self.nbytes + more if self.nbytes else 0) > budget.limit:
                return False
            budget.nbytes = after
            self.nbytes += more
            return True

    def add(self, more: int) -> None:
        """Count what is there already, or, below 0, what is there no more."""
        with self._budget.lock:
            self._budget.nbytes += more
            self.nbytes += more

    def exceeded(self, alone: int) -> bool:
        """Whether more is held than there is room for. `alone`: bytes of one message, which may take all the room."""
        held, limit = self._budget.nbytes, self._budget.limit
        return held > limit or (self.nbytes > alone and held + self.nbytes > limit)

    def describe(self) -> str:
        budget = self._budget
        return f"it holds {self.nbytes} bytes, all connections {budget.nbytes}, the bound is {budget.limit}"


class Holding:
    """Bytes that one call holds of a share: those its answer is expected to have, then those it has."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._nbytes = 0
        self._released = False
        self._lock = threading.Lock()

    def resize(self, nbytes: int) -> bool:
        """Hold `nbytes`, if there is room for them; else nothing. Once it is released nothing is held."""
        with self._lock:
            if self._released:
                return True
            more = nbytes - self._nbytes
            if more <= 0:
                self.share.add(more)
            elif not self.share.take(more):
                self._give_back()
                return False
            self._nbytes = nbytes
            return True

    def release(self) -> None:
        with self._lock:
            self._released = True
            self._give_back()

    def _give_back(self) -> None:
        if self._nbytes:
            self.share.add(-self._nbytes)
            self._nbytes = 0
