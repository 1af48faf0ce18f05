"""Every metric, named once. Fed once per batch (or group of arrivals), read once per scrape.

One labelled observation in a metrics library costs about as much as parsing a request, so requests are not observed
one by one: a batch of 32 that arrived in three groups records three queue times, each with its weight. What is
exported are plain Prometheus histograms and counters all the same.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forwardpass.errors import Reason
from forwardpass.observability.gpu import GpuMetrics
from forwardpass.observability.histogram import Histogram

# Seconds. From 50 µs, under which nothing crosses a network, to 10 s.
LATENCY_BOUNDS = (
    50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 750e-6, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 10e-3, 15e-3, 20e-3, 30e-3,
    50e-3, 75e-3, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KNOWN_SIZES = 1024  # sizes of runs that are counted each for itself
FOLD_AT = 100  # batches noted before they are folded into the histograms
STAGES = ("decode", "queue", "run", "encode", "total")

# name: (kind, labels, what it says)
METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "forwardpass_stage_seconds": (
        "histogram",
        ("model", "version", "stage"),
        "Seconds a request spent in each stage: decode, queue, run (its matrix in the network), encode (the answer, "
        "and handing it to the transport), total (from arrival to there). Decode, run and encode are those of its "
        "group or batch, counted for each request in it.",
    ),
    "forwardpass_batch_rows": ("histogram", ("model", "version"), "Rows in each matrix that was run."),
    "forwardpass_requests_total": (
        "counter",
        ("model", "version", "code"),
        "Requests answered, by gRPC status. A model that is not known counts under an empty name.",
    ),
    "forwardpass_refused_total": (
        "counter",
        ("model", "version", "reason"),
        f"Requests refused or failed, by reason: {', '.join(Reason)}.",
    ),
    "forwardpass_rows_total": ("counter", ("model", "version"), "Rows run through the network."),
    "forwardpass_batches_total": ("counter", ("model", "version"), "Matrices run through the network."),
    "forwardpass_isolated_total": (
        "counter",
        ("model", "version"),
        "Batches that failed and were run again in halves, to answer all but the culprit.",
    ),
    "forwardpass_queue_requests": ("gauge", ("model", "version"), "Requests waiting for an instance."),
    "forwardpass_queue_rows": ("gauge", ("model", "version"), "Rows waiting for an instance."),
    "forwardpass_running_requests": ("gauge", ("model", "version"), "Requests in a matrix that is being run."),
    "forwardpass_run_seconds_fitted": (
        "gauge",
        ("model", "version", "term"),
        "The run-time model a + b·rows that deadlines are judged by: term a in seconds, term b in seconds a row.",
    ),
    "forwardpass_model_info": (
        "gauge",
        ("model", "version", "provider", "batch_invariance"),
        "1 for each model version that serves. batch_invariance: exact, rounding, dependent, asserted or none.",
    ),
    "forwardpass_model_state": (
        "gauge",
        ("model", "version", "state"),
        "1 for the state that each model version is in: loading, ready, stale (it serves as it was; what is on disk "
        "now could not be loaded), unloading, failed, not_loaded (unloaded, or not asked for), skipped (a folder that "
        "looks like a model or a version and is none).",
    ),
    "forwardpass_model_load_failures_total": ("counter", ("model",), "Loads of a model that failed."),
    "forwardpass_model_instances": (
        "gauge",
        ("model", "version"),
        "Runs of the model that may go on at the same time.",
    ),
    "forwardpass_gpu_batches_total": (
        "counter",
        ("model", "version", "device", "way"),
        "Batches run on a GPU, by way: graph (a captured CUDA graph was replayed), bound (in fixed buffers, kernel by "
        "kernel), plain (ONNX Runtime copied in and out by itself).",
    ),
    "forwardpass_gpu_stage_seconds": (
        "histogram",
        ("model", "version", "device", "stage"),
        "Seconds on the device of those batches that were timed, in each stage: copy_in (host to device), run, "
        "copy_out (device to host).",
    ),
    "forwardpass_gpu_utilization_ratio": (
        "gauge",
        ("device",),
        "Share of the driver's last sampling period, 0 to 1, in which any kernel ran on a GPU in use, by NVML.",
    ),
    "forwardpass_gpu_memory_used_bytes": (
        "gauge",
        ("device",),
        "Memory taken on a GPU in use, by all processes, by NVML.",
    ),
    "forwardpass_gpu_memory_total_bytes": ("gauge", ("device",), "Memory that a GPU in use has, by NVML."),
    "forwardpass_in_flight_requests": ("gauge", (), "Requests accepted and not yet answered, over all models."),
    "forwardpass_in_flight_bytes": ("gauge", (), "Bytes of those requests."),
    "forwardpass_file_reloads_total": (
        "counter",
        ("files", "result"),
        "Changes seen of certificates or tokens, ok or failed: after a failed one the last good files stay in use.",
    ),
    "forwardpass_repository_errors_total": (
        "counter",
        (),
        "Looks at the repository's folder that failed; the models stay as they are then.",
    ),
    "forwardpass_ready": ("gauge", (), "1 while the server is ready for traffic."),
}


class DecodeRecord(NamedTuple):
    """A group of requests was decoded."""

    requests: int
    seconds: float


class BatchRecord(NamedTuple):
    """A batch was run. Times are on the server's clock."""

    waits: Sequence[tuple[float, int]]  # when its requests arrived, and how many did then
    matrices: Sequence[int]  # rows of each matrix it took
    taken: float
    run: float  # seconds in the network
    done: float
    answered: int  # requests answered with success


class ModelCounts(NamedTuple):
    """What a model version did since it was first loaded. Times are sums over requests, in seconds."""

    answered: int  # requests
    answered_seconds: float  # from arrival to answer
    answered_rows: int
    failed: int  # requests that failed or were refused
    failed_seconds: float
    ran: int  # requests that were in a run
    decode_seconds: float
    queue_seconds: float  # waiting, without being decoded
    run_seconds: float
    encode_seconds: float
    batches: int  # runs of the network
    runs: list[tuple[int, int, float, float]]  # rows; runs of so many, and their seconds in the network and after it
    last_ms: int  # when the last request came, in milliseconds since 1970; 0: none has


class ModelMetrics:
    """What one model version did. Thread-safe; its methods are called per batch or per group of arrivals."""

    def __init__(self, model: str, version: str) -> None:
        self.labels = (model, version)
        self.stages = {stage: Histogram(LATENCY_BOUNDS) for stage in STAGES}
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.codes: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.rows = self.batches = self.isolated = 0
        self._answered_rows = self._last_ms = 0
        self._runs: dict[int, list[float]] = {}  # rows -> runs, seconds in the network, seconds after it
        self._lost_seconds = self._refused_seconds = 0.0  # of requests that ran for nothing, and that did not run
        self._queue_told = 0.0
        self._lock = threading.Lock()
        # Noted as they happen, folded in a hundred at a time or at a scrape: a note costs a request that runs alone
        # a tenth of what five histograms do.
        self.gpu = GpuMetrics()
        self._notes: deque[BatchRecord] = deque()
        self._decodes: deque[DecodeRecord] = deque()

    def decoded(self, requests: int, seconds: float) -> None:
        """A group of `requests` was decoded in `seconds`, all together."""
        self._decodes.append(DecodeRecord(requests, seconds))
        if len(self._decodes) >= 10 * FOLD_AT:  # nothing has run for long: all are refused
            with self._lock:
                self._fold()

    def ran(self, note: BatchRecord) -> None:
        """A batch was run and its requests were told."""
        self._notes.append(note)
        if len(self._notes) >= FOLD_AT:
            with self._lock:
                self._fold()

    def _fold(self) -> None:
        """Bring what was noted since into the histograms. Lock held; notes may be added meanwhile."""
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
        """The part of `_fold` that is about runs, where some batch took several or some request was not answered."""
        for note, count in zip(notes, requests, strict=True):
            total = sum(note.matrices)
            shares = [rows / total if total else 1 / len(note.matrices) for rows in note.matrices]
            encode = max(0.0, note.done - note.taken - note.run)
            self._count_runs(note.matrices, [note.run * s for s in shares], [encode * s for s in shares])
            if note.answered == count:
                self._answered_rows += total
            else:
                # A batch that was run again in halves has its whole first. Its requests are taken to be alike.
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

    def refused(self, code: str, reason: Reason, times: int = 1, seconds: float = 0.0) -> None:
        """`times` requests were refused or failed; those that did not run had waited `seconds` altogether."""
        with self._lock:
            self._refused_seconds += seconds
            self.codes[code] = self.codes.get(code, 0) + times
            self.reasons[reason] = self.reasons.get(reason, 0) + times

    def isolate(self) -> None:
        with self._lock:
            self.isolated += 1

    def counts(self) -> ModelCounts:
        """All that was counted, up to now. No number is ever smaller than the last time."""
        with self._lock:
            self._fold()
            total = {stage: histogram.total for stage, histogram in self.stages.items()}
            # Requests are decoded while they wait; what was decoded and has not run yet must not make this fall.
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

    def snapshot(self, into: dict[str, Any]) -> None:
        """Add this model's samples to the families `into`."""
        with self._lock:
            self._fold()
            model, version = self.labels
            for stage, histogram in self.stages.items():
                into["forwardpass_stage_seconds"].add_metric(
                    (model, version, stage), histogram.buckets(), histogram.total
                )
            into["forwardpass_batch_rows"].add_metric(self.labels, self.batch_rows.buckets(), self.batch_rows.total)
            for code, count in self.codes.items():
                into["forwardpass_requests_total"].add_metric((model, version, code), count)
            for reason, count in self.reasons.items():
                into["forwardpass_refused_total"].add_metric((model, version, reason), count)
            into["forwardpass_rows_total"].add_metric(self.labels, self.rows)
            into["forwardpass_batches_total"].add_metric(self.labels, self.batches)
            into["forwardpass_isolated_total"].add_metric(self.labels, self.isolated)
        self.gpu.snapshot(self.labels, into)


_FAMILIES: dict[str, Callable[..., Any]] = {
    "histogram": HistogramMetricFamily,
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


class Exporter(Collector):
    """What a scrape reads. `source` adds the samples of everything that is there to a table of families."""

    def __init__(self, source: Callable[[dict[str, Any]], None]) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return self._empty().values()

    def collect(self) -> Iterator[Metric]:
        families = self._empty()
        self._source(families)
        yield from families.values()

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {
            name: _FAMILIES[kind](name, text, labels=list(labels)) for name, (kind, labels, text) in METRICS.items()
        }


def table() -> str:
    """The README's table of metrics, as Markdown."""
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for name, (kind, labels, text) in METRICS.items():
        lines.append(f"| `{name}` | {kind} | {', '.join(labels) or '-'} | {text} |")
    return "\n".join(lines)
