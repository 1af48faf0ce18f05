"""A line for a share of the requests, and for every error up to a rate: formatted and written by a thread of its own.

The thread that answered a request draws whether it is sampled, and leaves a few numbers in a bounded queue; when that
is full the line is dropped and counted, and the next line has the count. Never in it: tensors, tokens, other metadata.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from forwardpass.errors import printable
from forwardpass.observability.flight_record import KEPT_ID, Outcome, id_of
from forwardpass.observability.log_lines import fields
from forwardpass.observability.trace_context import parse_traceparent

logger = logging.getLogger("forwardpass.access")

WAITING: Final = 4096  # lines not yet written, at most
ERRORS_PER_SECOND: Final = 20.0  # lines of requests that were not answered with success, on average; and in a burst


class Origin(NamedTuple):
    """Where a request came from, as its transport knows it; formatted later. Empty: not known."""

    traceparent: str = ""
    peer: Callable[[], str] | None = None
    header: Callable[[str], str] | None = None  # any header's value; empty: it is not there
    protocol: str = "grpc"  # or http
    method: str = "ModelInfer"


class AccessEntry(NamedTuple):
    """One line to write. Times are seconds; None where they do not apply."""

    model: str
    version: str
    id_field: bytes  # see `flight_record.id_of`
    rows: int | None
    outcome: Outcome | None  # None: answered with success
    queue: float | None
    run: float | None
    total: float
    batch_rows: int | None
    origin: Origin
    requests: int = 1  # rejected together, for the same reason


class AccessLog:
    """Thread-safe, except that the draw may be off by a request where two threads draw at once."""

    def __init__(
        self, rate: float, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random
    ) -> None:
        """`rate`: the share of requests, above 0 and at most 1. `draw` returns numbers from 0 to 1."""
        self._rate = rate
        self._clock = clock
        self._draw = draw
        self._entries: queue.Queue[AccessEntry | None] = queue.Queue(WAITING)
        self._lost = 0  # lines dropped since the last one written
        self._allowed = ERRORS_PER_SECOND
        self._refilled = clock()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        logger.setLevel(logging.INFO)  # whatever the level of the rest

    def start(self) -> None:
        self._thread.start()

    def sampled(self) -> bool:
        """Whether a request that was answered with success gets a line."""
        return self._rate >= 1.0 or self._draw() < self._rate

    def error_allowed(self) -> bool:
        """Whether a request that was not gets one; what exceeds the rate counts as dropped."""
        with self._lock:
            now = self._clock()
            self._allowed = min(ERRORS_PER_SECOND, self._allowed + (now - self._refilled) * ERRORS_PER_SECOND)
            self._refilled = now
            if self._allowed < 1.0:
                self._lost += 1
                return False
            self._allowed -= 1.0
            return True

    def put(self, entry: AccessEntry) -> None:
        """Have a line written. Never blocks."""
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            with self._lock:
                self._lost += 1

    def close(self, seconds: float = 5.0) -> None:
        """Write what waits, for `seconds` at most."""
        if self._thread.ident is None:
            return
        try:
            self._entries.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        while (entry := self._entries.get()) is not None:
            with self._lock:
                lost, self._lost = self._lost, 0
            try:
                logger.info("request", extra=line_of(entry, lost))
            except Exception:  # one line that cannot be written must not end all others
                logging.getLogger(__name__).exception("a line of the access log could not be written")


def line_of(entry: AccessEntry, lost: int = 0) -> dict[str, Any]:
    """The fields of a line. `lost`: lines dropped before it."""
    status, reason = entry.outcome or ("OK", None)
    peer = entry.origin.peer() if entry.origin.peer is not None else ""
    return fields(
        request_id=printable(id_of(entry.id_field), 2 * KEPT_ID) or None,
        model=printable(entry.model),
        version=entry.version,
        rows=entry.rows,
        status=status,
        reason=str(reason) if reason is not None else None,
        queue_ms=_ms(entry.queue),
        run_ms=_ms(entry.run),
        total_ms=_ms(entry.total),
        batch_rows=entry.batch_rows,
        requests=entry.requests if entry.requests > 1 else None,
        trace_id=trace_id(entry.origin.traceparent),
        peer=printable(peer) or None,
        lines_dropped=lost or None,
    )


def trace_id(traceparent: str) -> str | None:
    """The trace's id of a W3C traceparent header; None if it is not one."""
    parent = parse_traceparent(traceparent)
    return None if parent is None else parent.trace_id


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
