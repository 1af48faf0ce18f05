"""The port for Prometheus: what a scrape reads, and nothing but /metrics over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from forwardpass.batching.admission import Admission
from forwardpass.execution.cuda.detect import driver
from forwardpass.observability.gpu import GpuReader
from forwardpass.observability.model_metrics import Exporter, ModelMetrics
from forwardpass.repository.repository import Repository
from forwardpass.security.policy import SecurityConfig
from forwardpass.transport.listeners import accepts

PATH = "/metrics"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # of WSGI


class MetricsSource:
    """Reads the counters of everything that there is."""

    def __init__(
        self,
        repository: Repository,
        admission: Admission,
        metrics: ModelMetrics,
        security: SecurityConfig,
        ready: Callable[[], bool],
        patience: float,
    ) -> None:
        """`metrics`: of what belongs to no model. `patience`: seconds that what is in flight may take to be counted."""
        self._repository = repository
        self._admission = admission
        self._metrics = metrics
        self._security = security
        self._ready = ready
        self._patience = patience
        self._gpus = GpuReader(lambda device: driver().bus_id(device))
        self.registry = CollectorRegistry()
        self.registry.register(Exporter(self._collect))

    def _collect(self, into: dict[str, Any]) -> None:
        self._admission.wait_empty(self._patience)
        self._metrics.snapshot(into)
        self._security.collect(into)
        devices: set[int] = set()
        for entry in self._repository.entries():
            into["forwardpass_model_state"].add_metric((entry.name, entry.version, entry.phase), 1)
            if entry.loaded is None:
                continue
            worker = entry.loaded.worker
            devices.update(entry.loaded.placement.devices)
            worker.metrics.snapshot(into)
            labels = worker.metrics.labels
            queue = worker.queue
            into["forwardpass_queue_requests"].add_metric(labels, queue.requests)
            into["forwardpass_queue_rows"].add_metric(labels, queue.rows)
            into["forwardpass_running_requests"].add_metric(labels, queue.running_requests)
            into["forwardpass_run_seconds_fitted"].add_metric((*labels, "a"), queue.run_time.a)
            into["forwardpass_run_seconds_fitted"].add_metric((*labels, "b"), queue.run_time.b)
            into["forwardpass_model_instances"].add_metric(labels, worker.options.instances)
            info = (*labels, entry.loaded.placement.label, entry.loaded.invariance.value)
            into["forwardpass_model_info"].add_metric(info, 1)
        for name, version, _ in self._repository.skipped():
            into["forwardpass_model_state"].add_metric((name, version, "skipped"), 1)
        for name, failures in self._repository.load_failures.copy().items():
            into["forwardpass_model_load_failures_total"].add_metric((name,), failures)
        self._gpus.collect(devices, into)
        into["forwardpass_in_flight_requests"].add_metric((), self._admission.requests)
        into["forwardpass_in_flight_bytes"].add_metric((), self._admission.nbytes)
        into["forwardpass_repository_errors_total"].add_metric((), self._repository.listing.failures)
        into["forwardpass_ready"].add_metric((), int(self._ready()))


class MetricsPort:
    """Answers /metrics on threads of its own, at every address on one port."""

    def __init__(self, registry: CollectorRegistry, hosts: Sequence[str], port: int) -> None:
        """`port` 0 picks one. Raises OSError where it can't listen."""
        self._servers: list[tuple[Any, threading.Thread]] = []
        self.port = port
        try:
            for host in hosts:
                server, thread = start_http_server(self.port, host, registry)
                self._servers.append((server, thread))
                self.port = server.server_port
                application = server.get_app()
                assert application is not None
                server.set_app(only_metrics(application))
        except OSError:
            self.stop()
            raise

    def accepts(self) -> bool:
        """Whether somebody still listens."""
        return all(thread.is_alive() and accepts(server.socket) for server, thread in self._servers)

    def stop(self) -> None:
        for server, thread in self._servers:
            server.shutdown()
            server.server_close()
            thread.join(2.0)


def only_metrics(application: Application) -> Application:
    """An application that answers 404 to every other path: 200 would pass for health."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            return application(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"expected {PATH}; health is gRPC's, grpc.health.v1\n".encode()]

    return answer
