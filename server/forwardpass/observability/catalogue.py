"""Every metric, declared once: name, kind, labels, meaning. HELP texts and the README's table are made from this.

To add one: declare a Metric here, and call `samples.add(...)` at a scrape, where its value is available.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as MetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as BucketExemplar

from forwardpass.errors import Reason
from forwardpass.observability.histogram import Exemplar, Histogram

_KINDS: dict[str, Callable[..., Any]] = {
    "histogram": HistogramMetricFamily,
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A counter's name ends in _total; times are in seconds, sizes in bytes.

    `together`: its value for a server of several processes, from theirs.
    """

    name: str
    kind: Literal["histogram", "counter", "gauge"]
    labels: tuple[str, ...]
    meaning: str
    together: Literal["sum", "max"] = "sum"


STAGE_SECONDS = Metric(
    "forwardpass_stage_seconds",
    "histogram",
    ("model", "version", "stage"),
    "Seconds a request spent in each stage: decode, queue, run (its matrix in the network), encode (the answer, "
    "and handing it to the transport), total (from arrival to there). Decode, run and encode are those of its "
    "group or batch, counted for each request in it. Not there before a model's first request.",
)
BATCH_ROWS = Metric(
    "forwardpass_batch_rows",
    "histogram",
    ("model", "version"),
    "Rows in each matrix that was run. Not there before a model's first request.",
)
REQUESTS_TOTAL = Metric(
    "forwardpass_requests_total",
    "counter",
    ("model", "version", "code"),
    "Requests answered, by gRPC status. A model that is not known counts under an empty name.",
)
REFUSED_TOTAL = Metric(
    "forwardpass_refused_total",
    "counter",
    ("model", "version", "reason"),
    f"Requests refused or failed, by reason: {', '.join(Reason)}.",
)
ROWS_TOTAL = Metric(
    "forwardpass_rows_total",
    "counter",
    ("model", "version"),
    "Rows run through the network.",
)
BATCHES_TOTAL = Metric(
    "forwardpass_batches_total",
    "counter",
    ("model", "version"),
    "Matrices run through the network.",
)
ISOLATED_TOTAL = Metric(
    "forwardpass_isolated_total",
    "counter",
    ("model", "version"),
    "Batches that failed and were run again in halves, to answer all except the culprit.",
)
QUEUE_REQUESTS = Metric(
    "forwardpass_queue_requests",
    "gauge",
    ("model", "version"),
    "Requests waiting for an instance.",
)
QUEUE_ROWS = Metric(
    "forwardpass_queue_rows",
    "gauge",
    ("model", "version"),
    "Rows waiting for an instance.",
)
RUNNING_REQUESTS = Metric(
    "forwardpass_running_requests",
    "gauge",
    ("model", "version"),
    "Requests in a matrix that is being run.",
)
RUN_SECONDS_FITTED = Metric(
    "forwardpass_run_seconds_fitted",
    "gauge",
    ("model", "version", "term"),
    "The run-time model a + b·rows that deadlines are judged by: term a in seconds, term b in seconds a row.",
    together="max",
)
MODEL_INFO = Metric(
    "forwardpass_model_info",
    "gauge",
    ("model", "version", "provider", "batch_invariance"),
    "1 for each model version that serves. batch_invariance: exact, rounding, dependent, asserted or none.",
    together="max",
)
MODEL_STATE = Metric(
    "forwardpass_model_state",
    "gauge",
    ("model", "version", "state"),
    "1 for the state that each model version is in: loading, ready, stale (it serves as it was; what is on disk "
    "now could not be loaded), unloading, failed, not_loaded (unloaded, or not asked for), skipped (a folder that "
    "looks like a model or a version and is none).",
    together="max",
)
MODEL_LOAD_FAILURES_TOTAL = Metric(
    "forwardpass_model_load_failures_total",
    "counter",
    ("model",),
    "Loads of a model that failed.",
    together="max",
)
MODEL_ON_DEMAND_LOADS_TOTAL = Metric(
    "forwardpass_model_on_demand_loads_total",
    "counter",
    ("model",),
    "Loads of a model that requests brought about, with --model-control on-demand.",
)
MODEL_EVICTIONS_TOTAL = Metric(
    "forwardpass_model_evictions_total",
    "counter",
    ("model",),
    "Times that a model was unloaded so that another fits in --model-memory.",
)
MODEL_MEMORY_BYTES = Metric(
    "forwardpass_model_memory_bytes",
    "gauge",
    (),
    "What loaded models count for in --model-memory.",
)
MODEL_INSTANCES = Metric(
    "forwardpass_model_instances",
    "gauge",
    ("model", "version"),
    "Runs of the model that may go on at the same time.",
)
GPU_BATCHES_TOTAL = Metric(
    "forwardpass_gpu_batches_total",
    "counter",
    ("model", "version", "device", "way"),
    "Batches run on a GPU, by way: graph (a captured CUDA graph was replayed), bound (in fixed buffers, kernel by "
    "kernel), plain (ONNX Runtime copied in and out by itself).",
)
GPU_STAGE_SECONDS = Metric(
    "forwardpass_gpu_stage_seconds",
    "histogram",
    ("model", "version", "device", "stage"),
    "Seconds on the device of those batches that were timed, in each stage: copy_in (host to device), run, "
    "copy_out (device to host).",
)
GPU_UTILIZATION_RATIO = Metric(
    "forwardpass_gpu_utilization_ratio",
    "gauge",
    ("device",),
    "Share of the driver's last sampling period, 0 to 1, in which any kernel ran on a GPU in use, by NVML.",
    together="max",
)
GPU_MEMORY_USED_BYTES = Metric(
    "forwardpass_gpu_memory_used_bytes",
    "gauge",
    ("device",),
    "Memory taken on a GPU in use, by all processes, by NVML.",
    together="max",
)
GPU_MEMORY_TOTAL_BYTES = Metric(
    "forwardpass_gpu_memory_total_bytes",
    "gauge",
    ("device",),
    "Memory that a GPU in use has, by NVML.",
    together="max",
)
IN_FLIGHT_REQUESTS = Metric(
    "forwardpass_in_flight_requests",
    "gauge",
    (),
    "Requests accepted and not yet answered, over all models.",
)
IN_FLIGHT_REQUESTS_MAX = Metric(
    "forwardpass_in_flight_requests_max",
    "gauge",
    (),
    "The bound on forwardpass_in_flight_requests: --max-requests.",
)
IN_FLIGHT_BYTES = Metric(
    "forwardpass_in_flight_bytes",
    "gauge",
    (),
    "Bytes of those requests.",
)
FILE_RELOADS_TOTAL = Metric(
    "forwardpass_file_reloads_total",
    "counter",
    ("files", "result"),
    "Changes seen of certificates or tokens, ok or failed: after a failed one the last good files stay in use.",
    together="max",
)
CERTIFICATE_EXPIRY_SECONDS = Metric(
    "forwardpass_certificate_expiry_seconds",
    "gauge",
    (),
    "When the TLS certificate in use, or one of its chain, expires: seconds since 1970.",
    together="max",
)
REPOSITORY_ERRORS_TOTAL = Metric(
    "forwardpass_repository_errors_total",
    "counter",
    (),
    "Looks at the repository's folder that failed; the models stay as they are then.",
    together="max",
)
SPANS_TOTAL = Metric(
    "forwardpass_spans_total",
    "counter",
    ("result",),
    "With tracing on, spans of requests and batches, by result: exported, queue_full (dropped: they came faster than "
    "they were exported), export_failed (dropped: the receiver did not take them).",
)
BUILD_INFO = Metric(
    "forwardpass_build_info",
    "gauge",
    ("version", "onnxruntime"),
    "1, with the versions of Forwardpass and of ONNX Runtime.",
    together="max",
)
PROCESSES = Metric(
    "forwardpass_processes",
    "gauge",
    ("state",),
    "With --processes, worker processes by state: ready, starting (it loads models, or is about to be started again), "
    "draining (it was replaced, and finishes its calls).",
)
PROCESS_ENDS_TOTAL = Metric(
    "forwardpass_process_ends_total",
    "counter",
    ("cause",),
    "With --processes, worker processes that ended without being asked to, by cause: the signal's name (SIGKILL, "
    "SIGSEGV), exited, hung.",
)
READY = Metric(
    "forwardpass_ready",
    "gauge",
    (),
    "1 while the server is ready for traffic.",
    together="max",
)

# Exported as 0 until they occur: Prometheus sees no increase in a counter that appears with a value.
FROM_ZERO = tuple(
    reason
    for reason in Reason
    if reason.startswith(("queue_", "server_", "deadline_"))
    or reason in ("run_failed", "run_timeout", "out_of_memory", "device_lost")
)

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class SampleSink(Protocol):
    """What a scrape's samples are added to."""

    def part(self, key: Hashable, changes: Hashable | None, fill: Callable[[SampleSink], object]) -> None:
        """Add what `fill` adds. As long as `changes` is equal for a `key`, it may be what was added the last time.

        `changes` None: always anew.
        """

    def add(self, metric: Metric, labels: Sequence[str], value: float) -> None:
        """Add one sample of a counter or a gauge; `labels` are the values of its labels, in their order."""

    def add_histogram(
        self, metric: Metric, labels: Sequence[str], histogram: Histogram, exemplars: Sequence[Exemplar | None] = ()
    ) -> None:
        """Add a whole histogram. `exemplars`: of each bucket, or none at all; only OpenMetrics shows them."""


class Scrape(SampleSink):
    """The samples of one scrape, as prometheus_client has them."""

    def __init__(self) -> None:
        self._families = {m: _KINDS[m.kind](m.name, m.meaning, labels=list(m.labels)) for m in METRICS}

    def part(self, key: Hashable, changes: Hashable | None, fill: Callable[[SampleSink], object]) -> None:  # noqa: ARG002
        fill(self)

    def add(self, metric: Metric, labels: Sequence[str], value: float) -> None:
        self._families[metric].add_metric(labels, value)

    def add_histogram(
        self, metric: Metric, labels: Sequence[str], histogram: Histogram, exemplars: Sequence[Exemplar | None] = ()
    ) -> None:
        buckets: list[Any] = list(histogram.buckets())
        for place, exemplar in enumerate(exemplars):
            if exemplar is not None:
                ids = {"trace_id": exemplar.trace_id, "span_id": exemplar.span_id}
                buckets[place] = (*buckets[place], BucketExemplar(ids, exemplar.value, exemplar.timestamp))
        self._families[metric].add_metric(labels, buckets, histogram.total)

    def __iter__(self) -> Iterator[MetricFamily]:
        yield from self._families.values()


class Exporter(Collector):
    """The collector that the registry calls at a scrape. `source` adds all samples."""

    def __init__(self, source: Callable[[SampleSink], object]) -> None:
        self._source = source

    def describe(self) -> Iterable[MetricFamily]:
        return Scrape()

    def collect(self) -> Iterator[MetricFamily]:
        samples = Scrape()
        self._source(samples)
        yield from samples


def table() -> str:
    """The README's table of metrics, as Markdown."""
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{m.name}` | {m.kind} | {', '.join(m.labels) or '-'} | {m.meaning} |" for m in METRICS]
    return "\n".join(lines)
