"""The Prometheus port: collects a scrape's samples, and serves /metrics and the status page if it has one."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from forwardpass import __version__
from forwardpass.batching.admission import Admission
from forwardpass.execution.cuda.detect import driver
from forwardpass.execution.onnx_runtime import ort
from forwardpass.observability import catalogue
from forwardpass.observability.catalogue import Exporter, Scrape
from forwardpass.observability.gpu import GpuReader
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository.repository import Repository
from forwardpass.security.policy import SecurityConfig
from forwardpass.status.page import StatusPage
from forwardpass.status.wsgi import Application, mounted
from forwardpass.transport.listeners import accepts

PATH = "/metrics"
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
        self._gpus = GpuReader(lambda device: driver().bus_id(device))
        self.registry = CollectorRegistry()
        self.registry.register(Exporter(self._collect))
        ProcessCollector(registry=self.registry)

    def _collect(self, samples: Scrape) -> None:
        self._admission.wait_empty(self._patience)
        self._metrics.snapshot(samples)
        self._security.collect(samples)
        devices: set[int] = set()
        for entry in self._repository.entries():
            samples.add(catalogue.MODEL_STATE, (entry.name, entry.version, entry.phase), 1)
            if entry.loaded is None:
                continue
            worker = entry.loaded.worker
            devices.update(entry.loaded.placement.devices)
            worker.metrics.snapshot(samples)
            labels = worker.metrics.labels
            queue = worker.queue
            samples.add(catalogue.QUEUE_REQUESTS, labels, queue.requests)
            samples.add(catalogue.QUEUE_ROWS, labels, queue.rows)
            samples.add(catalogue.RUNNING_REQUESTS, labels, queue.running_requests)
            samples.add(catalogue.RUN_SECONDS_FITTED, (*labels, "a"), queue.run_time.a)
            samples.add(catalogue.RUN_SECONDS_FITTED, (*labels, "b"), queue.run_time.b)
            samples.add(catalogue.MODEL_INSTANCES, labels, worker.options.instances)
            info = (*labels, entry.loaded.placement.label, entry.loaded.invariance.value)
            samples.add(catalogue.MODEL_INFO, info, 1)
        for name, version, _ in self._repository.skipped():
            samples.add(catalogue.MODEL_STATE, (name, version, "skipped"), 1)
        for name, failures in self._repository.load_failures.copy().items():
            samples.add(catalogue.MODEL_LOAD_FAILURES_TOTAL, (name,), failures)
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


class MetricsPort:
    """Serves /metrics, and the status page if there is one, on its own threads, at every address on one port."""

    def __init__(
        self, registry: CollectorRegistry, hosts: Sequence[str], port: int, page: StatusPage | None = None
    ) -> None:
        """`port` 0 picks one. Raises OSError if it can't listen."""
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
                found = only_metrics(application)
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


def only_metrics(application: Application) -> Application:
    """Wrap an application to return 404 for every other path: 200 would pass for health."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            return application(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"expected {PATH}; health is gRPC's, grpc.health.v1\n".encode()]

    return answer
