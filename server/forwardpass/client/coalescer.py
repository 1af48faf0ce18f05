"""Which calls of one client share a request, and when it is sent. Pure: no threads, no I/O, the clock injected.

Works as the server's own queue does: it wastes no time. While nothing is under way, what is there is sent at once;
while a request is, callers gather, and the next one takes them all. Rows that have waited for `max_wait` go beside the
requests under way. A caller that is alone sends its rows itself, as if nothing were here.

Callers are grouped by all that a request says once: model, version, output, priority, dtype, the shape of a row. And by
how long they can wait: calls whose time limits differ by more than a factor of two never share, so that what is urgent
is scheduled as urgent.
"""

from __future__ import annotations

import enum
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.errors import CallError, Cancelled
from forwardpass.client.results import ModelInfo

CLOSED: Final = "the client is closed"
_CROWD: Final = 2.0  # callers a request, of late, from which on everybody gathers


@dataclass(frozen=True, slots=True)
class Coalesce:
    """How calls of `predict` share requests.

    - `max_rows`: of one request.
    - `max_wait`: seconds, at most, that rows wait for requests under way to end while there is room for one more.
      Threads wait for whole milliseconds. 0: not at all, so that requests are smaller and more.
    - `in_flight`: requests of one group that may be under way at a time. With many servers, or slow models, more of
      them find work for more servers.
    - `max_bytes`: of the rows of one request. Arrays of more than half of it, or of half of `max_rows`, go alone.
    """

    max_rows: int = 256
    max_wait: float = 0.002
    in_flight: int = 4
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("max_rows", 2), ("in_flight", 1), ("max_bytes", 1), ("max_wait", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


class GroupKey(NamedTuple):
    """What callers that share a request have in common."""

    model: str
    version: str
    output: str | None
    priority: int
    tail: tuple[int, ...]  # the shape of a row
    dtype: np.dtype[Any]
    urgency: int | None  # the power of two below the time limit; None: no limit


class Bell(Protocol):
    """What callers wait for whose rows are sent together. How, is between them and whoever made it."""

    def ring(self, settled: Sequence[Rows]) -> None:
        """These have their outcome; or, if none, all who wait are to look what they wait for now."""


class Rows:
    """The rows of one caller, and what comes of them."""

    __slots__ = ("batch", "bell", "count", "data", "deadline", "gone", "outcome", "place", "there")

    bell: Any  # a Bell; another one when they are sent with fewer others than they waited with
    batch: PendingBatch  # those they wait with
    place: int
    there: Any  # for the bell's use

    def __init__(self, data: Any, count: int, deadline: float) -> None:
        self.data = data  # an array [count, ...], or [...] for one row; once they wait, a copy or its bytes
        self.count = count
        self.deadline = deadline  # of the injected clock
        self.gone = False  # nobody waits for them any more
        # The answers of the whole request, [B, ...], of which `count` rows from `place` on are this caller's.
        self.outcome: NDArray[Any] | CallError | None = None


class PendingBatch:
    """Callers whose rows wait to be sent in one request."""

    __slots__ = ("bell", "count", "rows", "taken")

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.rows: list[Rows] = []
        self.count = 0  # rows of all of them
        self.taken = False  # by a sender


class Turn(enum.Enum):
    """What a caller does now."""

    ALONE = enum.auto()  # sends its rows itself, then says `ended`
    SEND = enum.auto()  # its rows wait, and a sender is to be started for the group
    WAIT = enum.auto()  # its rows wait; a sender will come for them
    WATCH = enum.auto()  # the same; and it is the one to say `overdue` after `max_wait`, or when it leaves before


ALONE, SEND, WAIT, WATCH = Turn  # by themselves: looking members up in the class takes longer


class Group:
    """Callers that may share requests. All of it belongs to Coalescer but `version` and `shares`."""

    __slots__ = ("batches", "crowd", "gathering", "has_objects", "key", "max_rows", "sending", "shares", "version")

    def __init__(self, key: GroupKey, options: Coalesce) -> None:
        self.key = key
        row_bytes = key.dtype.itemsize * math.prod(key.tail)
        self.max_rows = max(1, min(options.max_rows, options.max_bytes // max(1, row_bytes)))  # of one request
        self.has_objects = key.dtype.hasobject
        self.batches: deque[PendingBatch] = deque()  # that wait; all but the last are full
        self.sending = 0  # requests under way, or about to be
        self.gathering = False  # a sender is about to take what waits
        self.crowd = 0.0  # callers a request, of late
        self.version = ""  # that answered last
        self.shares = True  # False once the model turned out not to let rows share a request


class CoalescedBatch(NamedTuple):
    """What goes into one request. `more`: another sender is to be started for what is left."""

    rows: list[Rows]
    more: bool


class Coalescer:
    """The groups of one client. Thread-safe.

    - Every `Rows` that was offered and is not gone is settled exactly once: by `settle`, `fail` or `close`.
    - At most `in_flight` requests of a group are under way. Whoever is told SEND, or `more`, or True by `ended` holds a
      place among them until `take` gives None or `ended` gives False.
    - Rows are taken in the order they came.
    """

    def __init__(self, options: Coalesce, clock: Callable[[], float], bell: Callable[[], Bell]) -> None:
        """`bell` makes what callers wait for."""
        self.options = options
        self._in_flight, self._max_wait = options.in_flight, options.max_wait
        self._clock = clock
        self._bell = bell
        self._lock = threading.Lock()
        self._groups: dict[GroupKey, Group] = {}
        self._closed = False
        self.rows = 0  # that were taken
        self.requests = 0  # that they were taken for

    def group(self, key: GroupKey) -> Group:
        """The group of these callers."""
        with self._lock:
            found = self._groups.get(key)
            if found is None:
                if len(self._groups) >= 1024:
                    self._groups = {key: group for key, group in self._groups.items() if group.sending}
                found = self._groups[key] = Group(key, self.options)
            return found

    def drop(self, group: Group) -> None:
        """Its callers are no group any more. What waits in it is still sent."""
        group.shares = False
        with self._lock:
            if self._groups.get(group.key) is group:
                del self._groups[group.key]

    def offer(self, group: Group, rows: Rows) -> Turn:
        """A caller comes. Raises ValueError once this is closed."""
        with self._lock:
            if self._closed:
                raise ValueError(CLOSED)
            sending, batches = group.sending, group.batches
            if sending < self._in_flight and group.crowd < _CROWD and not batches and not group.gathering:
                group.sending = sending + 1
                group.crowd = (group.crowd + 1) / 2
                return ALONE
            # Copied here: what a caller does to its array from now on is not sent.
            rows.data = rows.data.copy() if group.has_objects else rows.data.tobytes()
            if not batches or batches[-1].count + rows.count > group.max_rows:
                batches.append(PendingBatch(self._bell()))
            rows.batch = batch = batches[-1]
            rows.bell = batch.bell
            batch.rows.append(rows)
            batch.count += rows.count
            if group.gathering or sending == self._in_flight:
                return WAIT
            if sending and self._max_wait and len(batches) == 1:
                return WATCH if len(batch.rows) == 1 else WAIT
            group.sending = sending + 1
            group.gathering = True
            return SEND

    def overdue(self, group: Group, rows: Rows) -> bool:
        """A caller was to WATCH, and its time is over. True: a sender is to be started for the group."""
        with self._lock:
            if rows.batch.taken or group.gathering or group.sending == self._in_flight:
                return False
            group.sending += 1
            group.gathering = True
            return True

    def take(self, group: Group) -> CoalescedBatch | None:
        """For a sender: rows to send now. None: nothing is left, and there is no sender any more."""
        batches = group.batches
        with self._lock:
            now = self._clock()
            taken: list[Rows] = []
            while batches and not taken:
                batch = batches.popleft()
                batch.taken = True
                taken = [rows for rows in batch.rows if not rows.gone and rows.deadline > now]
                batch.rows = []  # they know it: no circle, so that what they hold goes with them
            group.gathering = False
            if not taken:
                group.sending -= 1
                return None
            group.gathering = more = bool(batches) and group.sending < self._in_flight
            group.sending += more
            group.crowd = (group.crowd + len(taken)) / 2
            self.rows += sum([rows.count for rows in taken])
            self.requests += 1
            return CoalescedBatch(taken, more)

    def ended(self, group: Group) -> bool:
        """A request of the group has ended. True: its sender is to `take` what waits by now."""
        with self._lock:
            if group.batches and not group.gathering:
                group.gathering = True
                return True
            group.sending -= 1
            return False

    def apart(self, batch: Sequence[Rows], size: int) -> list[Sequence[Rows]]:
        """Those that were sent together, in parts of at most `size` callers."""
        together = batch[0].bell
        parts = [batch[place : place + size] for place in range(0, len(batch), size)]
        for part in parts:
            bell = self._bell()
            for rows in part:
                rows.bell = bell
        together.ring(())
        return parts

    def gone(self, rows: Rows) -> bool:
        """A caller waits no longer. False: too late, it has its outcome."""
        with self._lock:
            rows.gone = rows.outcome is None
            return rows.gone

    def settle(self, batch: Sequence[Rows], answer: NDArray[Any]) -> None:
        """Give each its rows of `answer`, which has those of all, in their order."""
        place = 0
        with self._lock:
            for rows in batch:
                rows.place = place
                rows.outcome = answer
                place += rows.count
        batch[0].bell.ring(batch)

    def fail(self, batch: Sequence[Rows], error: CallError) -> None:
        """Give each the error that has no outcome yet."""
        with self._lock:
            settled = [rows for rows in batch if not rows.gone and rows.outcome is None]
            for rows in settled:
                rows.outcome = error
        for bell in dict.fromkeys(rows.bell for rows in settled):
            bell.ring(settled)

    def close(self) -> None:
        """Refuse what comes, and fail what was not taken yet. What was taken is its senders' to settle."""
        left: list[Rows] = []
        with self._lock:
            self._closed = True
            for group in self._groups.values():
                for batch in group.batches:
                    left += batch.rows
                    batch.rows, batch.taken = [], True
                group.batches.clear()
        self.fail(left, Cancelled("the client was closed"))


def may_share(info: ModelInfo, rank: int) -> bool:
    """Whether rows of a model with these metadata may share requests: the server lets them share its own runs.

    It does so only where a row's answer does not depend on its neighbours. `rank`: the axes of a row.
    """
    batch = info.parameters.get("max_batch_size", 0)
    return len(info.inputs) == 1 and len(info.inputs[0].shape) == rank + 1 and isinstance(batch, int) and batch > 0
