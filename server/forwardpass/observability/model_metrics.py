"""Metrics of each model version. Updated once per batch (or group of arrivals), read once per scrape.

One labelled observation in a metrics library costs about as much as parsing a request, so requests are not observed
one by one: a batch of 32 that arrived in three groups records three queue times, each with its weight. The exported
metrics are plain Prometheus histograms and counters all the same.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from forwardpass.errors import Reason
from forwardpass.observability import catalogue
from forwardpass.observability.access_log import AccessLog
from forwardpass.observability.catalogue import SampleSink
from forwardpass.observability.flight_recorder import FlightTrack
from forwardpass.observability.gpu import GpuMetrics
from forwardpass.observability.histogram import Histogram
from forwardpass.observability.recent_errors import RecentErrors
from forwardpass.observability.tracing import Tracing

# Seconds. From 50 µs, below which nothing crosses a network, to 10 s.
LATENCY_BOUNDS = (
    50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 750e-6, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 10e-3, 15e-3, 20e-3, 30e-3,
    50e-3, 75e-3, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KNOWN_SIZES = 1024  # sizes of runs that are counted individually
FOLD_AT = 100  # batches recorded before they are folded into the histograms
STAGES = ("decode", "queue", "run", "encode", "total")


class DecodeRecord(NamedTuple):
    """A group of requests that was decoded."""

    requests: int
    seconds: float


class BatchRecord(NamedTuple):
    """A batch that was run. Times are on the server's clock."""

    waits: Sequence[tuple[float, int]]  # arrival times in the order of its requests, and how many share each
    matrices: Sequence[int]  # rows of each matrix it took
    taken: float
    run: float  # seconds in the network
    done: float
    answered: int  # requests answered with success


class ModelCounts(NamedTuple):
    """Totals of a model version since it was first loaded. Times are sums over requests, in seconds."""

    answered: int  # requests
    answered_seconds: float  # from arrival to answer
    answered_rows: int
    failed: int  # requests that failed or were rejected
    failed_seconds: float
    ran: int  # requests that were in a run
    decode_seconds: float
    queue_seconds: float  # waiting, without the time to decode
    run_seconds: float
    encode_seconds: float
    batches: int  # runs of the network
    runs: list[tuple[int, int, float, float]]  # rows; runs of that many, their seconds in the network and after it
    last_ms: int  # when the last request arrived, in milliseconds since 1970; 0: none has


class ModelTotals(NamedTuple):
    """What the status page computes rates from: everything counted since the version was first loaded."""

    stages: dict[str, tuple[int, ...]]  # requests by bound of LATENCY_BOUNDS, one more beyond the last
    codes: dict[str, int]  # requests by gRPC status
    reasons: dict[str, int]  # requests refused or failed, by Reason
    rows: int
    batches: int
    isolated: int

    def plus(self, other: ModelTotals) -> ModelTotals:
        """These and those of the same version in another process."""
        stages = {
            stage: tuple(a + b for a, b in zip(counts, other.stages[stage], strict=True))
            for stage, counts in self.stages.items()
        }
        codes, reasons = Counter(self.codes), Counter(self.reasons)
        codes.update(other.codes)
        reasons.update(other.reasons)
        rows, batches, isolated = self.rows + other.rows, self.batches + other.batches, self.isolated + other.isolated
        return ModelTotals(stages, dict(codes), dict(reasons), rows, batches, isolated)


class ModelMetrics:
    """Metrics of one model version. Thread-safe; its methods are called per batch or per group of arrivals."""

    def __init__(self, model: str, version: str) -> None:
        self.labels = (model, version)
        self.stages = {stage: Histogram(LATENCY_BOUNDS) for stage in STAGES}
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.codes: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.rows = self.batches = self.isolated = 0
        self._answered_rows = self._last_ms = 0
        self._runs: dict[int, list[float]] = {}  # rows -> runs, seconds in the network, seconds after it
        self._lost_seconds = self._refused_seconds = 0.0  # of requests that ran in vain, and that did not run
        self._queue_told = 0.0
        self._lock = threading.Lock()
        self._changes = 0  # of anything that a scrape shows
        self._used = False  # a request has been decoded
        self.recent_errors = RecentErrors()
        # Recorded as they happen, folded in a hundred at a time or at a scrape: a record costs a request that runs
        # alone a tenth of updating five histograms.
        self.gpu = GpuMetrics()
        self.access: AccessLog | None = None  # None: it is turned off
        self.tracing: Tracing | None = None
        self.flight: FlightTrack | None = None  # what the flight recorder keeps of it; None: it is turned off
        self._notes: deque[BatchRecord] = deque()
        self._decodes: deque[DecodeRecord] = deque()

    def decoded(self, requests: int, seconds: float) -> None:
        """Record a group of `requests` that was decoded in `seconds` altogether."""
        self._decodes.append(DecodeRecord(requests, seconds))
        if len(self._decodes) >= 10 * FOLD_AT:  # nothing has run for a long time: all are rejected
            with self._lock:
                self._fold()

    def ran(self, note: BatchRecord) -> None:
        """Record a batch that was run and whose requests were answered."""
        self._notes.append(note)
        if len(self._notes) >= FOLD_AT:
            with self._lock:
                self._fold()

    def _fold(self) -> None:
        """Fold the records made since into the histograms. Lock held; records may be added meanwhile."""
        if not self._decodes and not self._notes:
            return
        self._changes += 1
        self._used = True
        decodes = [self._decodes.popleft() for _ in range(len(self._decodes))]
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        stages = self.stages
        if decodes:
            stages["decode"].record([n.seconds / n.requests for n in decodes], [n.requests for n in decodes])
        if not notes:
            return
        arrivals = [(note, arrival, count) for note in notes for arrival, count in note.waits]
        weights = [count for _, _, count in arrivals]
        stages["queue"].record([note.taken - arrival for note, arrival, _ in arrivals], weights)
        stages["total"].record([note.done - arrival for note, arrival, _ in arrivals], weights)
        requests = [sum([count for _, count in note.waits]) for note in notes]
        runs = [note.run for note in notes]
        encodes = [max(0.0, note.done - note.taken - note.run) for note in notes]
        stages["run"].record(runs, requests)
        stages["encode"].record(encodes, requests)
        matrices = [rows for note in notes for rows in note.matrices]
        self.batch_rows.record(matrices, [1] * len(matrices))
        self.rows += sum(matrices)
        self.batches += len(matrices)
        answered = sum(note.answered for note in notes)
        if answered:
            self.codes["OK"] = self.codes.get("OK", 0) + answered
        if len(matrices) == len(notes) and answered == sum(requests):
            self._answered_rows += sum(matrices)
            self._count_runs(matrices, runs, encodes)
        else:
            self._fold_unevenly(notes, requests)
        self._last_ms = round((time.time() - time.monotonic() + notes[-1].waits[-1][0]) * 1e3)

    def _fold_unevenly(self, notes: Sequence[BatchRecord], requests: Sequence[int]) -> None:
        """The part of `_fold` for runs, if some batch took several or some request was not answered with success."""
        for note, count in zip(notes, requests, strict=True):
            total = sum(note.matrices)
            shares = [rows / total if total else 1 / len(note.matrices) for rows in note.matrices]
            encode = max(0.0, note.done - note.taken - note.run)
            self._count_runs(note.matrices, [note.run * s for s in shares], [encode * s for s in shares])
            if note.answered == count:
                self._answered_rows += total
            else:
                # A batch that was run again in halves lists the whole first. Its requests are assumed to be alike.
                answered = note.answered / count
                self._answered_rows += round(answered * note.matrices[0]) if note.matrices else 0
                self._lost_seconds += (1 - answered) * sum([(note.done - at) * many for at, many in note.waits])

    def _count_runs(self, sizes: Iterable[int], runs: Iterable[float], encodes: Iterable[float]) -> None:
        known = self._runs
        for rows, run, encode in zip(sizes, runs, encodes, strict=True):
            entry = known.get(rows)
            if entry is not None:
                entry[0] += 1
                entry[1] += run
                entry[2] += encode
            elif len(known) < KNOWN_SIZES:
                known[rows] = [1, run, encode]

    def refused(self, code: str, reason: Reason, times: int = 1, seconds: float = 0.0, text: str = "") -> None:
        """Count `times` requests rejected or failed; those that did not run had waited `seconds` altogether.

        `text`: the error's, to be among the recent errors; without one only the counters change.
        """
        if text:
            self.recent_errors.add(code, reason, text, times)
        with self._lock:
            self._changes += 1
            self._refused_seconds += seconds
            self.codes[code] = self.codes.get(code, 0) + times
            self.reasons[reason] = self.reasons.get(reason, 0) + times
        if self.flight is not None:
            self.flight.refused(code, reason, times)

    def isolate(self) -> None:
        with self._lock:
            self._changes += 1
            self.isolated += 1

    def counts(self) -> ModelCounts:
        """The totals up to now. No number ever decreases."""
        with self._lock:
            self._fold()
            total = {stage: histogram.total for stage, histogram in self.stages.items()}
            # Requests are decoded while they wait; those decoded that have not run yet must not make this decrease.
            self._queue_told = max(self._queue_told, total["queue"] - total["decode"])
            answered = self.codes.get("OK", 0)
            return ModelCounts(
                answered,
                max(0.0, total["total"] - self._lost_seconds),
                self._answered_rows,
                sum(self.codes.values()) - answered,
                self._lost_seconds + self._refused_seconds,
                sum(self.stages["queue"].counts),
                total["queue"] - self._queue_told,
                self._queue_told,
                total["run"],
                total["encode"],
                self.batches,
                [(rows, int(e[0]), e[1], e[2]) for rows, e in sorted(self._runs.items())],
                self._last_ms,
            )

    def totals(self) -> ModelTotals:
        """A copy of the counters up to now."""
        with self._lock:
            self._fold()
            stages = {stage: tuple(histogram.counts) for stage, histogram in self.stages.items()}
            return ModelTotals(stages, self.codes.copy(), self.reasons.copy(), self.rows, self.batches, self.isolated)

    def snapshot(self, samples: SampleSink) -> None:
        """Add this model's samples to `samples`."""
        with self._lock:
            self._fold()
            # Which request is an example may change without any count.
            changes = (self, self._changes) if self.tracing is None else None
            samples.part(self.labels, changes, self._add)
        self.gpu.snapshot(self.labels, samples)

    def _add(self, samples: SampleSink) -> None:
        """The part of `snapshot` that changes with counts alone. Lock held."""
        model, version = self.labels
        codes, reasons = self.codes, self.reasons
        if model:
            if self._used:  # Prometheus takes a histogram that is not there for one that is empty
                exemplars = () if self.tracing is None else self.tracing.exemplars(self.labels)
                for stage, histogram in self.stages.items():
                    examples = exemplars if stage == "total" else ()
                    samples.add_histogram(catalogue.STAGE_SECONDS, (model, version, stage), histogram, examples)
                samples.add_histogram(catalogue.BATCH_ROWS, self.labels, self.batch_rows)
            samples.add(catalogue.ROWS_TOTAL, self.labels, self.rows)
            samples.add(catalogue.BATCHES_TOTAL, self.labels, self.batches)
            samples.add(catalogue.ISOLATED_TOTAL, self.labels, self.isolated)
            codes = {"OK": 0} | codes
            reasons = dict.fromkeys(catalogue.FROM_ZERO, 0) | reasons
        for code, count in codes.items():
            samples.add(catalogue.REQUESTS_TOTAL, (model, version, code), count)
        for reason, count in reasons.items():
            samples.add(catalogue.REFUSED_TOTAL, (model, version, reason), count)

    def latencies(self) -> list[int]:
        """Requests by latency, from arrival to answer: counts below each of LATENCY_BOUNDS, and above the last."""
        with self._lock:
            self._fold()
            return list(self.stages["total"].counts)
