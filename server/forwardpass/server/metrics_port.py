"""The Prometheus port: collects a scrape's samples, and serves /metrics and the status page if it has one."""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest, start_http_server
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.openmetrics import exposition as openmetrics_format

from forwardpass import __version__
from forwardpass.batching.admission import Admission
from forwardpass.execution.cuda.detect import driver
from forwardpass.execution.onnx_runtime import ort
from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import Exporter, SampleSink
from forwardpass.observability.exposition import Exposition
from forwardpass.observability.gpu import GpuReader
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository.model_version import ModelVersion
from forwardpass.repository.on_demand import OnDemand
from forwardpass.repository.repository import Repository
from forwardpass.security.policy import SecurityConfig
from forwardpass.status.page import StatusPage
from forwardpass.status.wsgi import Application, mounted
from forwardpass.transport.listeners import accepts

PATH = "/metrics"
PLAIN, OPENMETRICS = "text/plain;", "application/openmetrics-text; version=1."  # content types that are made here
ESCAPED = ("escaping=dots", "escaping=values")  # names, in ways that are left to prometheus_client
GZIP_LEVEL = 1  # most of what there is to gain, in a fraction of the time
PATIENCE = 30.0  # seconds that a connection may take to send a request, or to take what it asked for


class MetricsSource:
    """Collects the metrics of the whole server."""

    def __init__(
        self,
        repository: Repository,
        admission: Admission,
        metrics: ModelMetrics,
        security: SecurityConfig,
        ready: Callable[[], bool],
        patience: float,
    ) -> None:
        """`metrics`: of requests without a model. `patience`: seconds to wait for requests in flight to be counted."""
        self._repository = repository
        self._admission = admission
        self._metrics = metrics
        self._security = security
        self._ready = ready
        self._patience = patience
        self.on_demand: OnDemand | None = None  # where models are loaded on demand
        self._gpus = GpuReader(lambda device: driver().bus_id(device))
        self.registry = CollectorRegistry()
        self.registry.register(Exporter(self.collect))
        self._process = CollectorRegistry()
        self.registry.register(ProcessCollector(registry=self._process))
        self._exposition = Exposition(self.collect)
        self._lock = threading.Lock()

    def text(self, openmetrics: bool) -> bytes:
        """The metrics of the whole server, in OpenMetrics' format or in Prometheus'. Scrapes take turns."""
        with self._lock:
            parts = list(self._exposition.text(openmetrics))
        generate = openmetrics_format.generate_latest if openmetrics else generate_latest
        return b"".join((*parts, generate(self._process)))

    def collect(self, samples: SampleSink) -> None:
        """Add all samples. Blocks for a moment, until requests in flight are counted."""
        self._admission.wait_empty(self._patience)
        self._metrics.snapshot(samples)
        self._security.collect(samples)
        devices: set[int] = set()
        for entry in self._repository.entries():
            if entry.loaded is not None:
                devices.update(entry.loaded.placement.devices)
                entry.loaded.worker.metrics.snapshot(samples)
            gauges = _Gauges.of(entry)
            samples.part(("gauges", entry.name, entry.version), gauges, gauges.add)
        for name, version, _ in self._repository.skipped():
            samples.add(catalogue.MODEL_STATE, (name, version, "skipped"), 1)
        for name, failures in self._repository.load_failures.copy().items():
            samples.add(catalogue.MODEL_LOAD_FAILURES_TOTAL, (name,), failures)
        if self.on_demand is not None:
            for metric, counts in (
                (catalogue.MODEL_ON_DEMAND_LOADS_TOTAL, self.on_demand.loads),
                (catalogue.MODEL_EVICTIONS_TOTAL, self.on_demand.evictions),
            ):
                for name, count in counts.copy().items():
                    samples.add(metric, (name,), count)
            samples.add(catalogue.MODEL_MEMORY_BYTES, (), self.on_demand.memory)
        self._gpus.collect(devices, samples)
        samples.add(catalogue.IN_FLIGHT_REQUESTS, (), self._admission.requests)
        samples.add(catalogue.IN_FLIGHT_REQUESTS_MAX, (), self._admission.max_requests)
        samples.add(catalogue.IN_FLIGHT_BYTES, (), self._admission.nbytes)
        samples.add(catalogue.REPOSITORY_ERRORS_TOTAL, (), self._repository.listing.failures)
        if self._metrics.tracing is not None:
            for result, spans in self._metrics.tracing.counts.items():
                samples.add(catalogue.SPANS_TOTAL, (result,), spans)
        samples.add(catalogue.BUILD_INFO, (__version__, ort.__version__), 1)
        samples.add(catalogue.READY, (), int(self._ready()))


class _Gauges(NamedTuple):
    """What is shown of a model version beside its counts."""

    labels: tuple[str, str]
    phase: str
    queue: tuple[int, int, int] | None  # requests, rows, running; None: it does not serve
    fitted: tuple[float, float] = (0.0, 0.0)
    instances: int = 0
    info: tuple[str, str] = ("", "")  # provider, batch invariance

    @staticmethod
    def of(entry: ModelVersion) -> _Gauges:
        labels, phase = (entry.name, entry.version), entry.phase
        if entry.loaded is None:
            return _Gauges(labels, phase, None)
        worker = entry.loaded.worker
        queue, run_time = worker.queue, worker.queue.run_time
        return _Gauges(
            labels,
            phase,
            (len(queue), queue.waiting_rows, queue.running_requests),
            (run_time.a, run_time.b),
            worker.options.instances,
            (entry.loaded.placement.label, entry.loaded.invariance.value),
        )

    def add(self, samples: SampleSink) -> None:
        labels = self.labels
        samples.add(catalogue.MODEL_STATE, (*labels, self.phase), 1)
        if self.queue is None:
            return
        for metric, value in zip(
            (catalogue.QUEUE_REQUESTS, catalogue.QUEUE_ROWS, catalogue.RUNNING_REQUESTS), self.queue, strict=True
        ):
            samples.add(metric, labels, value)
        for term, seconds in zip("ab", self.fitted, strict=True):
            samples.add(catalogue.RUN_SECONDS_FITTED, (*labels, term), seconds)
        samples.add(catalogue.MODEL_INSTANCES, labels, self.instances)
        samples.add(catalogue.MODEL_INFO, (*labels, *self.info), 1)


class MetricsPort:
    """Serves /metrics, and the status page if there is one, on its own threads, at every address on one port."""

    def __init__(
        self,
        registry: CollectorRegistry,
        hosts: Sequence[str],
        port: int,
        page: StatusPage | None = None,
        text: Callable[[bool], bytes] | None = None,
    ) -> None:
        """`port` 0 picks one. `text`: see `quick`; None: the registry alone. Raises OSError if it can't listen."""
        self._servers: list[tuple[Any, threading.Thread]] = []
        self._page = page
        self.port = port
        try:
            for host in hosts:
                server, thread = start_http_server(self.port, host, registry)
                self._servers.append((server, thread))
                self.port = server.server_port
                application = server.get_app()
                assert application is not None
                found = only_metrics(application if text is None else quick(text, application))
                server.set_app(found if page is None else mounted(page, found))
                server.RequestHandlerClass = patient(server.RequestHandlerClass)
        except OSError:
            self.stop()
            raise

    def accepts(self) -> bool:
        """Whether every listener still works."""
        return all(thread.is_alive() and accepts(server.socket) for server, thread in self._servers)

    def stop(self) -> None:
        if self._page is not None:
            self._page.stop()
        for server, thread in self._servers:
            # Wakes the loop, which looks for a wish to end twice a second only.
            with contextlib.suppress(OSError):
                server.socket.shutdown(socket.SHUT_RDWR)
            server.shutdown()
            server.server_close()
            thread.join(2.0)


def patient(handler: Any) -> Any:
    """A class of connections that waits PATIENCE seconds for its client, and leaves without a word in the log.

    Otherwise a client that sends no request, or a viewer whose machine sleeps, would keep its thread for ever.
    """

    class PatientHandler(handler):  # type: ignore[misc]
        timeout = PATIENCE

        def setup(self) -> None:
            super().setup()
            self.wfile = _PatientWriter(self.connection)

        def handle(self) -> None:
            with contextlib.suppress(TimeoutError):
                super().handle()

    return PatientHandler


class _PatientWriter(io.BufferedIOBase):
    """Writes to a socket; one that takes nothing any more counts as gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._connection.sendall(data)
        except TimeoutError:
            raise BrokenPipeError("the client takes no more") from None
        return len(data)


def quick(text: Callable[[bool], bytes], application: Application) -> Application:
    """Wrap prometheus_client's application: `text` has what scrapers ask for, the application all else that it knows.

    That is a choice of metrics by name, names escaped in other ways, and later versions of OpenMetrics.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        _, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        openmetrics = content_type.startswith(OPENMETRICS)
        if (
            environ["REQUEST_METHOD"] != "GET"
            or environ.get("QUERY_STRING")
            or not (openmetrics or content_type.startswith(PLAIN))
            or content_type.endswith(ESCAPED)
        ):
            return application(environ, start_response)
        body = text(openmetrics)
        headers = [("Content-Type", content_type)]
        if gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", "")):
            body = gzip.compress(body, GZIP_LEVEL)
            headers.append(("Content-Encoding", "gzip"))
        start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [body]

    return answer


def only_metrics(application: Application) -> Application:
    """Wrap an application to return 404 for every other path: 200 would pass for health."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            return application(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"expected {PATH}; health is gRPC's, grpc.health.v1\n".encode()]

    return answer
