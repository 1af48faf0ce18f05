"""Real OTLP receivers for the tests: a gRPC server and an HTTP server with OpenTelemetry's own messages.

Each keeps what it is sent: spans by (trace, span), with the attributes of their resource.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from caller import until
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Received:
    """Spans received so far. `raw`: every message, as it came."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.refuse = False  # answer every export with an error that is not worth a retry
        self.raw = b""
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def take(self, message: bytes) -> None:
        request = trace_service_pb2.ExportTraceServiceRequest.FromString(message)
        with self._lock:
            self.raw += message
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource))
                for scope in resource.scope_spans:
                    self.spans += scope.spans

    def clear(self) -> None:
        with self._lock:
            self.spans.clear()
            self.raw = b""

    def wait(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        """All spans, once `enough` of them came."""
        until(lambda: enough(self.spans), "spans")
        return list(self.spans)


def attributes(of: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}


@contextmanager
def grpc_receiver() -> Iterator[Received]:
    received = Received()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            if received.refuse:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
            received.take(request.SerializeToString())
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    received.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield received
    finally:
        server.stop(0).wait()


@contextmanager
def http_receiver() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            if known and not received.refuse:
                received.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200 if known and not received.refuse else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
