"""Client spans, if the program has set up OpenTelemetry: a span for each call, whose context goes to the server.

Decided once for each client, when it is created: a program without a TracerProvider pays for a comparison a call, and
opentelemetry is not imported. A span has the call's method and status; never tensors, tokens or errors' texts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from forwardpass.client.errors import CallError

Headers = tuple[tuple[str, str], ...]


class ClientTracing:
    """For any number of threads and tasks."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import propagate, trace

        self._tracer = provider.get_tracer("forwardpass.client")
        self._inject = propagate.inject
        self._trace = trace

    def headers(self) -> Headers:
        """The current context, as headers: traceparent, tracestate, baggage."""
        carrier: dict[str, str] = {}
        self._inject(carrier)
        return tuple(carrier.items())

    @contextmanager
    def span(self, path: str) -> Iterator[Headers]:
        """A span for one call of the method at `path`, all its attempts together. Yields the headers to send."""
        trace = self._trace
        service, _, method = path.lstrip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self._tracer.start_span(f"{service}/{method}", kind=trace.SpanKind.CLIENT, attributes=attributes)
        carrier: dict[str, str] = {}
        self._inject(carrier, trace.set_span_in_context(span))
        code: int | None = 1  # cancelled: of a task, or by closing the client
        try:
            yield tuple(carrier.items())
            code = 0
        except CallError as error:
            code = int(error.status)
            span.set_attribute("error.type", error.status.name)
            raise
        except Exception:
            code = None  # not a call's end
            raise
        finally:
            if code is not None:
                span.set_attribute("rpc.grpc.status_code", code)
            if code != 0:
                span.set_status(trace.StatusCode.ERROR)
            span.end()


def open_client_tracing() -> ClientTracing | None:
    """None unless the program has set a TracerProvider, for which it must have imported opentelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return ClientTracing(provider)
