"""Traces of requests and batches: plain records in a bounded queue, which one thread makes spans of and exports.

The thread that answered a batch decides which of its requests are sampled, and appends one record for these; nothing
is formatted and no thread is woken. Every LOOK_SECONDS the records become spans (`otel_spans`, the only file here that
imports OpenTelemetry), which leave in groups, by the exporter that the standard OTEL_* variables choose. What finds the
queue full, or is not exported, is dropped and counted. Never in a span: tensors, tokens, errors' texts.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

from forwardpass.errors import SettingsError
from forwardpass.observability.access_log import Origin
from forwardpass.observability.flight_record import Outcome
from forwardpass.observability.histogram import Exemplar
from forwardpass.observability.log_limit import LogLimit
from forwardpass.observability.trace_context import Sampled, Sampler, sampler_of

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

Labels = tuple[str, str]  # model and version
LOOK_SECONDS: Final = 1.0  # between two looks at the queue, at most: spans made in a row cost less than one by one
LINKS: Final = 128  # from the span of a batch to its requests, at most: OpenTelemetry's limit


class TracedRequest(NamedTuple):
    """A sampled request. Times are seconds on the server's clock."""

    sampled: Sampled
    origin: Origin
    tracestate: str
    baggage: str
    id_field: bytes  # see `flight_record.id_of`
    rows: int | None
    arrival: float
    decoded: float | None
    outcome: Outcome | None  # None: answered with success


class TracedRun(NamedTuple):
    """The batch that requests were in."""

    taken: float
    run: float  # seconds in the network
    ended: float  # the responses were encoded
    rows: int
    runs: int  # matrices that it took
    requests: int
    closed: str
    instance: int


class TracedBatch(NamedTuple):
    """The sampled requests of one batch; or, without a run, requests that were rejected together."""

    labels: Labels
    requests: Sequence[TracedRequest]
    done: float  # the responses were with the transport
    run: TracedRun | None


class SpanMaker(Protocol):
    """Makes spans of records, and exports them. For one thread, except `shutdown`."""

    def spans_of(self, batch: TracedBatch, unix_offset: int) -> tuple[list[Any], list[Exemplar]]:
        """The spans of a record, and for each request the exemplar that its latency makes.

        `unix_offset`: nanoseconds since 1970 when the server's clock was 0.
        """

    def export(self, spans: Sequence[Any]) -> bool:
        """Whether they were exported. Blocks for OTEL_EXPORTER_OTLP_TIMEOUT at most."""

    def shutdown(self) -> None:
        """End an export that goes on, and refuse others."""


class Tracing:
    """Thread-safe. `choose`, `decide` and `put` never block."""

    def __init__(
        self,
        maker: SpanMaker,
        sampler: Sampler,
        *,
        bounds: Sequence[float],
        baggage: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`bounds`: of the histogram that exemplars are for. `baggage`: whether any of its entries is recorded.

        From `environ`: the bounds of OTEL_BSP_*. Raises SettingsError if one is no number.
        """
        limits = {} if environ is None else environ
        self.sampler = sampler
        self.choose, self.decide = sampler.choose, sampler.decide
        self.baggage = bool(baggage)
        self._maker = maker
        self._waiting: deque[TracedBatch] = deque()
        self._most = int(_number(limits, "OTEL_BSP_MAX_QUEUE_SIZE", 2048))
        self._group = int(_number(limits, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512))
        self._delay = _number(limits, "OTEL_BSP_SCHEDULE_DELAY", 5000) / 1e3
        self._bounds = bounds
        self._exemplars: dict[Labels, list[Exemplar | None]] = {}
        self.counts = {"exported": 0, "queue_full": 0, "export_failed": 0}  # spans
        self._lock = threading.Lock()
        self._enough = max(1, self._most // 4)  # waiting, so that they are looked at before it is time
        self._look = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="tracing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, batch: TracedBatch) -> None:
        """Have the spans of a record made."""
        if len(self._waiting) < self._most:
            self._waiting.append(batch)
            if len(self._waiting) == self._enough:
                self._look.set()
        else:
            self._count("queue_full", len(batch.requests) + (batch.run is not None))

    def exemplars(self, labels: Labels) -> Sequence[Exemplar | None]:
        """For each bucket of a model's latencies the last request in it that was sampled; empty: none was yet."""
        return self._exemplars.get(labels, ())

    def close(self, seconds: float) -> None:
        """Export what waits, for `seconds` at most."""
        self._closing = True
        self._look.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                logger.warning("traces could not be exported within %.3g s: %d batches are lost", seconds, len(self))
                self._maker.shutdown()

    def __len__(self) -> int:
        return len(self._waiting)

    def _count(self, result: str, spans: int) -> None:
        with self._lock:
            self.counts[result] += spans

    def _work(self) -> None:
        ready: list[Any] = []
        since = time.monotonic()
        closing = False
        while not closing:
            self._look.wait(min(self._delay, LOOK_SECONDS))
            self._look.clear()
            closing = self._closing
            if not ready:
                since = time.monotonic()
            offset = time.time_ns() - time.monotonic_ns()
            while self._waiting:
                ready += self._made(self._waiting.popleft(), offset)
                if len(ready) >= self._group:
                    self._export(ready)
                    ready = []
                    since = time.monotonic()
            if ready and (closing or time.monotonic() - since >= self._delay):
                self._export(ready)
                ready = []
        self._maker.shutdown()

    def _made(self, batch: TracedBatch, offset: int) -> list[Any]:
        try:
            spans, exemplars = self._maker.spans_of(batch, offset)
        except Exception:  # one record must not end all others
            logger.exception("spans could not be made")
            return []
        if batch.run is not None:
            kept = self._exemplars.setdefault(batch.labels, [None] * (len(self._bounds) + 1))
            for exemplar in exemplars:
                kept[bisect_left(self._bounds, exemplar.value)] = exemplar
        return spans

    def _export(self, spans: list[Any]) -> None:
        try:
            exported = self._maker.export(spans)
        except Exception:
            logger.exception("spans could not be exported")
            exported = False
        self._count("exported" if exported else "export_failed", len(spans))


def _number(environ: Mapping[str, str], name: str, default: int) -> float:
    given = environ.get(name, "").strip()
    try:
        value = float(given or default)
    except ValueError:
        value = 0.0
    if value < 1:
        raise SettingsError(f"{name}: expected a number of at least 1, got {given!r}")
    return value


def wanted(mode: Literal["auto", "on", "off"], environ: Mapping[str, str]) -> bool:
    """Whether to trace: `mode`, and for auto what the standard variables ask for."""
    if mode == "off" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return mode == "on" or bool(exporter) or any(environ.get(name) for name in endpoints)


def open_tracing(
    mode: Literal["auto", "on", "off"], environ: Mapping[str, str], bounds: Sequence[float], baggage: Sequence[str] = ()
) -> Tracing | None:
    """Tracing as the settings and the standard variables ask for it; None: it is off.

    Raises SettingsError for variables that are not valid, and if `mode` is on and OpenTelemetry is not installed.
    """
    if not wanted(mode, environ):
        return None
    try:
        from forwardpass.observability.otel_spans import open_maker
    except ImportError as error:
        missing = f"tracing needs {error.name}, which is not installed: pip install 'forwardpass[otel]'"
        if mode == "on":
            raise SettingsError(missing) from None
        logger.warning(
            "OTEL_* variables ask for traces, and none are made: %s; --tracing off says that is meant", missing
        )
        return None
    make: Callable[..., SpanMaker] = open_maker
    return Tracing(make(environ, baggage), sampler_of(environ), bounds=bounds, baggage=baggage, environ=environ)
