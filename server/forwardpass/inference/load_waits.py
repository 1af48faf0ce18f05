"""Calls that wait until their model is loaded, bounded in number and bytes, until their deadline at most.

A call waits as the bytes of its message: what it asks of can be checked only by the model's signature. Thread-safe.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

from forwardpass.batching.admission import Admission
from forwardpass.errors import DeadlineExceeded, Overloaded, Reason, RequestError, printable
from forwardpass.transport.interface import Room

CallT = TypeVar("CallT")

SHARE: Final = 2  # of the server's bounds, which part may wait for loads: half of it
LEAST_SWEPT: Final = 64  # ended calls that are kept until their deadline at most
RETRY_AFTER: Final = 0.5  # seconds, sent with refusals for the bound


class OnDemandLoads(Protocol):
    """What loads models because they were asked for."""

    def begin(
        self, name: str, version: str, error: RequestError, done: Callable[[RequestError | None], None]
    ) -> RequestError | None:
        """Have the model loaded for which `error` was raised. Never blocks.

        None: `done` will be called once, from any thread, when that is over: with None, or with the error for those
        who waited. Else the error for this call: `error`, or that of an attempt a moment ago.
        """


class HeldCall(Generic[CallT]):
    """A call with its message, and while it waits for a load, a PendingRequest."""

    __slots__ = ("arrival", "call", "cancelled", "ended", "message", "room", "seconds_left", "timings", "waits")

    def __init__(self, call: CallT, message: bytes, how: tuple[float, float | None, bool], room: Room | None) -> None:
        """`how`: arrival, seconds left then, whether timings are wanted."""
        self.call = call
        self.message = message
        self.arrival, self.seconds_left, self.timings = how
        self.room = room
        self.cancelled: Callable[[], None] = lambda: None  # called on the thread that cancels it
        self.ended: Callable[[RequestError | None], None] = lambda _: None  # called on any other, when its wait is over
        self.waits: LoadWaits | None = None

    @property
    def deadline(self) -> float:
        return math.inf if self.seconds_left is None else self.arrival + self.seconds_left

    def cancel(self) -> None:
        """Its client no longer waits."""
        if self.waits is not None and self.waits.remove(self):
            self.message = b""
            self.cancelled()

    def end(self, error: RequestError | None) -> None:
        """Its wait is over: None: the model may serve now. The last of `cancel` and `end` does nothing."""
        if self.waits is not None and self.waits.remove(self):
            self.ended(error)


class LoadWaits:
    """All calls that wait for loads, of every transport.

    - Each counts in the server's requests and bytes in flight, of which half may wait for loads, and for one model
      half of what the others leave of that, so that a slow load leaves room for other models' calls.
    - A call's deadline ends its wait, within milliseconds; so does its client.
    """

    def __init__(self, loads: OnDemandLoads, admission: Admission, clock: Callable[[], float] = time.monotonic) -> None:
        self._loads = loads
        self._admission = admission
        self._clock = clock
        self._wake = threading.Condition()
        self._held: dict[HeldCall[Any], str] = {}  # and the model that each waits for
        self._of: dict[str, tuple[int, int]] = {}  # by model: calls and bytes
        self._nbytes = 0
        self._due: list[tuple[float, int, HeldCall[Any]]] = []  # a heap, of those with a deadline
        self._ids = itertools.count()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._held)

    def hold(
        self, held: HeldCall[Any], error: RequestError, ended: Callable[[RequestError | None], None]
    ) -> RequestError | None:
        """Have a call wait for the load of the model of `error`. Returns an error where it must not.

        `ended` is called once unless it is cancelled, by any thread: with an error, or None once it may be taken again.
        """
        assert error.model is not None
        held.ended = ended
        name, version = error.model
        refused = self._admit(held, name)
        if refused is not None:
            return refused
        refused = self._loads.begin(name, version, error, held.end)
        if refused is not None:
            return refused if self.remove(held) else None
        return None

    def _admit(self, held: HeldCall[Any], name: str) -> RequestError | None:
        nbytes = len(held.message)
        with self._wake:
            calls, size = self._of.get(name, (0, 0))
            free_calls = self._admission.max_requests // SHARE - (len(self._held) - calls)
            free_bytes = self._admission.max_bytes // SHARE - (self._nbytes - size)
            if (calls + 1) * 2 > free_calls or (calls and (size + nbytes) * 2 > free_bytes):
                return Overloaded(
                    f"{calls} calls of {size} bytes wait for model '{printable(name)}' to be loaded, and "
                    f"{len(self._held)} of {self._nbytes} bytes for any; no more may",
                    reason=Reason.LOAD_WAITING,
                    retry_after=RETRY_AFTER,
                )
            refused = self._admission.admit(1, nbytes)
            if refused is not None:
                return refused
            held.waits = self
            self._held[held] = name
            self._of[name] = (calls + 1, size + nbytes)
            self._nbytes += nbytes
            if held.deadline < math.inf:
                heapq.heappush(self._due, (held.deadline, next(self._ids), held))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._expire, name="load-deadlines", daemon=True)
                    self._thread.start()
                if self._due[0][2] is held:
                    self._wake.notify()
        return None

    def remove(self, held: HeldCall[Any]) -> bool:
        """Count a call no longer. Returns whether it waited until now."""
        nbytes = len(held.message)
        with self._wake:
            name = self._held.pop(held, None)
            if name is None:
                return False
            calls, size = self._of.pop(name)
            if calls > 1:
                self._of[name] = (calls - 1, size - nbytes)
            self._nbytes -= nbytes
            if len(self._due) > 2 * len(self._held) + LEAST_SWEPT:
                self._due = [due for due in self._due if due[2] in self._held]
                heapq.heapify(self._due)
        self._admission.release(1, nbytes)
        return True

    def _expire(self) -> None:
        while True:
            with self._wake:
                now = self._clock()
                expired = []
                while self._due and self._due[0][0] <= now:
                    expired.append(heapq.heappop(self._due)[2])
                if not expired:
                    self._wake.wait(self._due[0][0] - now if self._due else None)
                    continue
            for held in expired:
                held.end(
                    DeadlineExceeded("the deadline passed while the model was loaded", reason=Reason.DEADLINE_EXPIRED)
                )
            del expired, held
