"""The last batches and refusals of a server, kept in two rings: what it did just before someone asks.

On a request's way a batch costs a packed record (`flight_record`) and one append. Everything else is decoded and
formatted when a dump is asked for. Times in a dump are seconds on the monotonic clock; `unix_offset`
added to them gives seconds since 1970.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from forwardpass.errors import Reason, printable
from forwardpass.observability.flight_record import KEPT_ID, Outcome, RequestInFlight, unpack

FORMAT: Final = "forwardpass-flight"
FORMAT_VERSION: Final = 1


# A batch: its packed record, and with it the outcomes of its requests where not all were answered with success.
Entry = bytes | tuple[bytes, Sequence[Outcome | None]]


class Refusal(NamedTuple):
    """Requests rejected or failed together, for one reason; as forwardpass_refused_total counts them."""

    time: float
    labels: tuple[str, str]  # model and version; empty where the request names none that is known
    code: str  # gRPC status
    reason: Reason
    times: int


class FlightRecorder:
    """Two rings. Thread-safe: an append is one step of the interpreter, and a reader takes a copy in one step."""

    def __init__(self, size: int, closed: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        """`size`: batches kept, and refusals kept. `closed`: the reasons for which batches close, by number."""
        self.batches: deque[Entry] = deque(maxlen=size)
        self.refusals: deque[Refusal] = deque(maxlen=size)
        self.clock = clock
        self._closed = closed
        self._labels: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def track(self, model: str, version: str) -> FlightTrack:
        """What records a model version; the same numbers are used when it is loaded again."""
        labels = (model, version)
        with self._lock:
            if labels not in self._labels:
                self._labels.append(labels)
            return FlightTrack(self, labels, self._labels.index(labels))

    def dump(self, cause: str, models: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Everything, as JSON has it. `cause`: of the dump; `models`: what is known of each model version."""
        head, batches, refused = self.parts(cause, models)
        return {**head, "batches": list(batches), "refused": list(refused)}

    def parts(
        self, cause: str, models: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[dict[str, Any], Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        """As `dump`, without having all of it in memory: the head, the batches and the refusals."""
        batches, refusals = list(self.batches), list(self.refusals)
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "cause": cause,
            "at": self.clock(),
            "unix_offset": time.time() - time.monotonic(),
            "kept": self.batches.maxlen,
            "models": list(models),
        }
        return head, map(self._batch, batches), map(_refusal, refusals)

    def _batch(self, entry: Entry) -> dict[str, Any]:
        packed, outcomes = entry if isinstance(entry, tuple) else (entry, None)
        batch = unpack(packed)
        model, version = self._labels[batch.model]
        return {
            "model": model,
            "version": version,
            "instance": batch.instance,  # -1: the thread that received the requests
            "closed": self._closed[batch.closed],
            "requests": batch.requests,
            "answered": batch.answered,
            "matrices": list(batch.matrices),
            "taken": batch.taken,
            "run": batch.run,
            "ended": batch.ended,
            "done": batch.done,
            "each": [_request(r, outcomes[i] if outcomes else None) for i, r in enumerate(batch.each)],
        }


class FlightTrack:
    """What records one model version. Called once for each batch, or group of refusals, by any thread.

    `keep` is the ring's own append: a call less for each batch.
    """

    def __init__(self, recorder: FlightRecorder, labels: tuple[str, str], number: int) -> None:
        self.number = number  # of the model version, for its packed records
        self._labels = labels
        self.keep: Callable[[Entry], None] = recorder.batches.append
        self._refusals = recorder.refusals
        self._clock = recorder.clock

    def refused(self, code: str, reason: Reason, times: int) -> None:
        self._refusals.append(Refusal(self._clock(), self._labels, code, reason, times))


def _request(request: RequestInFlight, outcome: Outcome | None) -> dict[str, Any]:
    found: dict[str, Any] = {"arrival": request.arrival, "rows": request.rows}
    if request.request_id:
        found["id"] = printable(request.request_id, 2 * KEPT_ID)
    if math.isfinite(request.deadline):
        found["deadline"] = request.deadline
    if outcome is not None:
        found["status"], found["reason"] = outcome[0], str(outcome[1])
    return found


def _refusal(refusal: Refusal) -> dict[str, Any]:
    model, version = refusal.labels
    return {
        "time": refusal.time,
        "model": model,
        "version": version,
        "status": refusal.code,
        "reason": str(refusal.reason),
        "requests": refusal.times,
    }
