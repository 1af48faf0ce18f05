"""Decides which calls of one client share a request, and when it is sent. Pure: no threads, no I/O, injected clock.

Like the server's own queue, it never idles: while no request is in flight, waiting rows are sent at once; while one
is, callers gather, and the next request takes them all. Rows that have waited for `max_wait` are sent beside the
requests in flight. A lone caller sends its rows itself, without coalescing.

Callers are grouped by all that a request contains once: model, version, output, priority, dtype, the shape of a row;
and by urgency: calls whose time limits differ by more than a factor of two never share a request, so that urgent calls
are scheduled as urgent.
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
_CROWD: Final = 2.0  # recent callers per request; from this on, all callers gather


@dataclass(frozen=True, slots=True)
class Coalesce:
    """How calls of `predict` share requests.

    - `max_rows`: most rows of one request.
    - `max_wait`: most seconds that rows wait for requests in flight to end while fewer than `in_flight` are. Threads
      wait for whole milliseconds. 0: no wait, so that there are more and smaller requests.
    - `in_flight`: most requests of one group in flight. With many servers, or slow models, a larger number keeps more
      servers busy.
    - `max_bytes`: most bytes of rows in one request. Arrays above half of it, or above half of `max_rows`, go alone.
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
    """The properties that callers must have in common to share a request."""

    model: str
    version: str
    output: str | None
    priority: int
    tail: tuple[int, ...]  # the shape of a row
    dtype: np.dtype[Any]
    urgency: int | None  # exponent of the power of two above the time limit; None: no limit


class Bell(Protocol):
    """Wakes callers whose rows are sent together. How they wait is up to the implementation."""

    def ring(self, settled: Sequence[Rows]) -> None:
        """Wake the callers of `settled`, which have an outcome; if empty, waiting callers must re-read their `bell`."""


class Rows:
    """The rows of one caller, and their outcome."""

    __slots__ = ("batch", "bell", "count", "data", "deadline", "gone", "outcome", "place", "there")

    bell: Any  # a Bell; replaced when the rows are sent with fewer others than they waited with
    batch: PendingBatch  # the batch that they wait in
    place: int
    there: Any  # for use by the bell

    def __init__(self, data: Any, count: int, deadline: float) -> None:
        self.data = data  # an array [count, ...], or [...] for one row; while waiting, a copy or its bytes
        self.count = count
        self.deadline = deadline  # on the injected clock
        self.gone = False  # the caller no longer waits
        # The outputs of the whole request, [B, ...]: the `count` rows from `place` on are this caller's.
        self.outcome: NDArray[Any] | CallError | None = None


class PendingBatch:
    """Rows that wait to be sent in one request."""

    __slots__ = ("bell", "count", "rows", "taken")

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.rows: list[Rows] = []
        self.count = 0  # the total of their rows
        self.taken = False  # by a sender


class Turn(enum.Enum):
    """What a caller must do next."""

    ALONE = enum.auto()  # send its rows itself, then call `ended`
    SEND = enum.auto()  # its rows wait; it must start a sender for the group
    WAIT = enum.auto()  # its rows wait; a sender will take them
    WATCH = enum.auto()  # as WAIT, but it must call `overdue` after `max_wait`, or when it leaves earlier


ALONE, SEND, WAIT, WATCH = Turn  # as globals: looking members up in the class is slower


class Group:
    """Callers that may share requests. Owned by Coalescer, except `version` and `shares`."""

    __slots__ = ("batches", "crowd", "gathering", "has_objects", "key", "max_rows", "sending", "shares", "version")

    def __init__(self, key: GroupKey, options: Coalesce) -> None:
        self.key = key
        row_bytes = key.dtype.itemsize * math.prod(key.tail)
        self.max_rows = max(1, min(options.max_rows, options.max_bytes // max(1, row_bytes)))  # of one request
        self.has_objects = key.dtype.hasobject
        self.batches: deque[PendingBatch] = deque()  # waiting batches; all except the last are full
        self.sending = 0  # requests in flight, or about to be
        self.gathering = False  # a sender is about to take the waiting rows
        self.crowd = 0.0  # recent average of callers per request
        self.version = ""  # the version that answered last
        self.shares = True  # False once the model no longer lets rows share a request


class CoalescedBatch(NamedTuple):
    """The rows of one request. `more`: another sender must be started for the remaining rows."""

    rows: list[Rows]
    more: bool


class Coalescer:
    """The groups of one client. Thread-safe.

    - Every `Rows` that was offered and is not gone is settled exactly once: by `settle`, `fail` or `close`.
    - At most `in_flight` requests of a group are in flight. SEND, `more`, or True from `ended` gives a sender one
      of these places, which it holds until `take` returns None or `ended` returns False.
    - Rows are taken in the order of their arrival.
    """

    def __init__(self, options: Coalesce, clock: Callable[[], float], bell: Callable[[], Bell]) -> None:
        """`bell` makes the Bells that callers wait for."""
        self.options = options
        self._in_flight, self._max_wait = options.in_flight, options.max_wait
        self._clock = clock
        self._bell = bell
        self._lock = threading.Lock()
        self._groups: dict[GroupKey, Group] = {}
        self._closed = False
        self.rows = 0  # rows taken by senders
        self.requests = 0  # requests that they were taken for

    def group(self, key: GroupKey) -> Group:
        """The group with this key, created if necessary."""
        with self._lock:
            found = self._groups.get(key)
            if found is None:
                if len(self._groups) >= 1024:
                    self._groups = {key: group for key, group in self._groups.items() if group.sending}
                found = self._groups[key] = Group(key, self.options)
            return found

    def drop(self, group: Group) -> None:
        """Dissolve a group. Rows that wait in it are still sent."""
        group.shares = False
        with self._lock:
            if self._groups.get(group.key) is group:
                del self._groups[group.key]

    def offer(self, group: Group, rows: Rows) -> Turn:
        """Offer a caller's rows. Raises ValueError after `close`."""
        with self._lock:
            if self._closed:
                raise ValueError(CLOSED)
            sending, batches = group.sending, group.batches
            if sending < self._in_flight and group.crowd < _CROWD and not batches and not group.gathering:
                group.sending = sending + 1
                group.crowd = (group.crowd + 1) / 2
                return ALONE
            # Copied, so that later changes to the caller's array are not sent.
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
        """Call when the time of a WATCH is over. True: a sender must be started for the group."""
        with self._lock:
            if rows.batch.taken or group.gathering or group.sending == self._in_flight:
                return False
            group.sending += 1
            group.gathering = True
            return True

    def take(self, group: Group) -> CoalescedBatch | None:
        """For a sender: the rows to send now. None: no rows are left, and the sender must end."""
        batches = group.batches
        with self._lock:
            now = self._clock()
            taken: list[Rows] = []
            while batches and not taken:
                batch = batches.popleft()
                batch.taken = True
                taken = [rows for rows in batch.rows if not rows.gone and rows.deadline > now]
                batch.rows = []  # the rows refer to the batch: break the cycle, so that they are freed early
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
        """Record that a request of the group has ended. True: its sender must `take` the rows waiting by now."""
        with self._lock:
            if group.batches and not group.gathering:
                group.gathering = True
                return True
            group.sending -= 1
            return False

    def apart(self, batch: Sequence[Rows], size: int) -> list[Sequence[Rows]]:
        """Split rows that were sent together into parts of at most `size` callers."""
        together = batch[0].bell
        parts = [batch[place : place + size] for place in range(0, len(batch), size)]
        for part in parts:
            bell = self._bell()
            for rows in part:
                rows.bell = bell
        together.ring(())
        return parts

    def gone(self, rows: Rows) -> bool:
        """Record that a caller no longer waits. False: too late, it has its outcome."""
        with self._lock:
            rows.gone = rows.outcome is None
            return rows.gone

    def settle(self, batch: Sequence[Rows], answer: NDArray[Any]) -> None:
        """Give each caller its rows of `answer`, which has the rows of all, in order."""
        place = 0
        with self._lock:
            for rows in batch:
                rows.place = place
                rows.outcome = answer
                place += rows.count
        batch[0].bell.ring(batch)

    def fail(self, batch: Sequence[Rows], error: CallError) -> None:
        """Give the error to every caller that has no outcome yet."""
        with self._lock:
            settled = [rows for rows in batch if not rows.gone and rows.outcome is None]
            for rows in settled:
                rows.outcome = error
        for bell in dict.fromkeys(rows.bell for rows in settled):
            bell.ring(settled)

    def close(self) -> None:
        """Reject new rows, and fail those not taken yet. Rows that were taken are settled by their senders."""
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

    It does so only if a row's output does not depend on its neighbours. `rank`: the number of axes of a row.
    """
    batch = info.parameters.get("max_batch_size", 0)
    return len(info.inputs) == 1 and len(info.inputs[0].shape) == rank + 1 and isinstance(batch, int) and batch > 0
