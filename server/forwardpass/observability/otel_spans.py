"""Records as OpenTelemetry's spans, and the exporter of the standard OTEL_* variables. Needs the `otel` extra.

The one file of the server that imports opentelemetry; `tracing` imports it when traces are asked for. Spans are made
with their times, ids and links at once, past the SDK's tracer: what a tracer would do is decided by then.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.baggage import get_all
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from forwardpass import __version__
from forwardpass.errors import SettingsError, printable
from forwardpass.errors import Status as GrpcStatus
from forwardpass.observability.flight_record import KEPT_ID, id_of
from forwardpass.observability.histogram import Exemplar
from forwardpass.observability.tracing import LINKS, TracedBatch, TracedRequest, TracedRun

SERVICE: Final = "inference.GRPCInferenceService"
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_OTLP: Final = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
_BAGGAGE = W3CBaggagePropagator()


class OtelSpans:
    """The SpanMaker of `tracing`."""

    def __init__(self, exporter: SpanExporter, resource: Resource, baggage: Sequence[str] = ()) -> None:
        """`baggage`: the entries that become attributes, as baggage.KEY."""
        self._exporter = exporter
        self._resource = resource
        self._baggage = frozenset(baggage)
        self._scope = InstrumentationScope("forwardpass", __version__)
        self._ids = RandomIdGenerator()

    def spans_of(self, batch: TracedBatch, unix_offset: int) -> tuple[list[ReadableSpan], list[Exemplar]]:
        run = batch.run
        own = [self._context(request) for request in batch.requests]
        shared: tuple[Link, ...] = ()
        spans: list[ReadableSpan] = []
        if run is not None:
            context = SpanContext(self._ids.generate_trace_id(), self._ids.generate_span_id(), False, _SAMPLED)
            shared = (Link(context),)
            spans.append(self._batch_span(batch.labels, run, context, own, (unix_offset, batch.done)))
        exemplars = []
        for request, context in zip(batch.requests, own, strict=True):
            spans.append(self._request_span(batch, request, context, shared, unix_offset))
            exemplars.append(
                Exemplar(
                    f"{context.trace_id:032x}", f"{context.span_id:016x}", batch.done - request.arrival,
                    unix_offset / 1e9 + batch.done,
                )
            )  # fmt: skip
        return spans, exemplars

    def _context(self, request: TracedRequest) -> SpanContext:
        state = TraceState.from_header([request.tracestate]) if request.tracestate else None
        return SpanContext(request.sampled.trace_id, self._ids.generate_span_id(), False, _SAMPLED, state)

    def _batch_span(
        self, labels: tuple[str, str], run: TracedRun, context: SpanContext, own: Sequence[SpanContext],
        times: tuple[int, float],
    ) -> ReadableSpan:  # fmt: skip
        offset, done = times
        model, version = labels
        attributes: dict[str, Any] = {
            "forwardpass.model": model,
            "forwardpass.version": version,
            "forwardpass.batch.rows": run.rows,
            "forwardpass.batch.requests": run.requests,
            "forwardpass.batch.closed": run.closed,
            "forwardpass.batch.instance": run.instance,
        }
        if run.runs != 1:
            attributes["forwardpass.batch.runs"] = run.runs
        return ReadableSpan(
            f"batch {model}",
            context,
            None,
            self._resource,
            attributes,
            (Event("ran", None, _at(run.taken + run.run, offset)), Event("encoded", None, _at(run.ended, offset))),
            [Link(c) for c in own[:LINKS]],
            SpanKind.INTERNAL,
            instrumentation_scope=self._scope,
            start_time=_at(run.taken, offset),
            end_time=_at(done, offset),
        )

    def _request_span(
        self, batch: TracedBatch, request: TracedRequest, context: SpanContext, shared: Sequence[Link], offset: int
    ) -> ReadableSpan:
        origin, run = request.origin, batch.run
        events = [Event("received", None, _at(request.arrival, offset))]
        if request.decoded is not None:
            events.append(Event("decoded", None, _at(request.decoded, offset)))
        if run is not None:
            events += (
                Event("dequeued", None, _at(run.taken, offset)),
                Event("ran", None, _at(run.taken + run.run, offset)),
                Event("encoded", None, _at(run.ended, offset)),
            )
        name, status, attributes = _of_call(origin.protocol, origin.method, request.outcome)
        attributes = attributes.copy()
        if batch.labels[0]:
            attributes["forwardpass.model"], attributes["forwardpass.version"] = batch.labels
        if request.rows is not None:
            attributes["forwardpass.rows"] = request.rows
        if request.id_field:
            attributes["forwardpass.request_id"] = printable(id_of(request.id_field), 2 * KEPT_ID)
        if request.baggage and self._baggage:
            entries = get_all(_BAGGAGE.extract({"baggage": request.baggage}))
            attributes |= {f"baggage.{key}": str(entries[key]) for key in sorted(self._baggage & entries.keys())}
        trace_id, parent_id = request.sampled
        return ReadableSpan(
            name,
            context,
            SpanContext(trace_id, parent_id, True, _SAMPLED, context.trace_state) if parent_id else None,
            self._resource,
            attributes,
            events,
            shared,
            SpanKind.SERVER,
            status=status,
            start_time=_at(request.arrival, offset),
            end_time=_at(batch.done, offset),
            instrumentation_scope=self._scope,
        )

    def export(self, spans: Sequence[Any]) -> bool:
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _at(seconds: float, unix_offset: int) -> int:
    return unix_offset + round(seconds * 1e9)


@lru_cache(256)
def _of_call(protocol: str, method: str, outcome: tuple[str, str] | None) -> tuple[str, Status, dict[str, Any]]:
    """What spans of calls of one kind and outcome share: name, status, attributes."""
    code, reason = outcome or ("OK", "")
    status = Status() if outcome is None else Status(StatusCode.ERROR, f"{code}: {reason}")
    if protocol == "http":
        name = f"POST {method}"
        attributes: dict[str, Any] = {"http.request.method": "POST", "forwardpass.status": code}
    else:
        name = f"{SERVICE}/{method}"
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": SERVICE,
            "rpc.method": method,
            "rpc.grpc.status_code": GrpcStatus[code].value,
        }
    if outcome is not None:
        attributes |= {"error.type": code, "forwardpass.reason": str(reason)}
    return name, status, attributes


def open_maker(environ: Mapping[str, str], baggage: Sequence[str]) -> OtelSpans:
    """Raises SettingsError for an exporter or a protocol that there is not."""
    return OtelSpans(_exporter(environ), _resource(), baggage)


def _resource() -> Resource:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come before what is known otherwise."""
    resource = Resource.create()
    own = {SERVICE_VERSION: __version__}
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        own[SERVICE_NAME] = "forwardpass"
    return resource.merge(
        Resource({k: v for k, v in own.items() if k != SERVICE_VERSION or k not in resource.attributes})
    )


def _exporter(environ: Mapping[str, str]) -> SpanExporter:
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if name != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER: expected otlp or none, got {name!r}")
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    # Without either, gRPC, as the SDK for Python does it.
    protocol = next((environ[v].strip().lower() for v in variables if environ.get(v, "").strip()), "grpc")
    if protocol not in _OTLP:
        raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL: expected {' or '.join(_OTLP)}, got {protocol!r}")
    try:
        exporter: SpanExporter = importlib.import_module(_OTLP[protocol]).OTLPSpanExporter()
    except ValueError as error:
        raise SettingsError(f"OTEL_EXPORTER_OTLP_*: {error}") from None
    return exporter
