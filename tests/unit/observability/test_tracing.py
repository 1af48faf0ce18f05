"""Records to spans, the bound of what waits, what is dropped, and when there is tracing at all."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from forwardpass.errors import Reason, SettingsError
from forwardpass.observability import catalogue
from forwardpass.observability.access_log import Origin
from forwardpass.observability.catalogue import Exporter, Scrape
from forwardpass.observability.histogram import Exemplar
from forwardpass.observability.model_metrics import LATENCY_BOUNDS, BatchRecord, ModelMetrics
from forwardpass.observability.trace_context import Sampled, Sampler
from forwardpass.observability.tracing import (
    LINKS,
    TracedBatch,
    TracedRequest,
    TracedRun,
    Tracing,
    open_tracing,
    wanted,
)

RUN = TracedRun(1.25, 0.5, 1.875, 8, 1, 3, "idle", 0)
REQUEST = TracedRequest(Sampled(0xA, 0xB), Origin(), "k=v", "", b"\x1a\x03one", 2, 1.0, 1.125, None)
BATCH = TracedBatch(("m", "1"), [REQUEST], 2.0, RUN)


class Maker:
    """Makes of a record one span for each request and one for the batch, and exports when it is let."""

    def __init__(self, works: bool = True) -> None:
        self.exported: list[list[Any]] = []
        self.may = threading.Event()
        self.began = threading.Event()
        self.ended = False
        self._works = works

    def spans_of(self, batch: TracedBatch, unix_offset: int) -> tuple[list[Any], list[Exemplar]]:
        assert unix_offset > 0
        if batch.labels == ("broken", "1"):
            raise ValueError("no spans")
        made = [Exemplar(f"{r.sampled.trace_id:x}", "b", batch.done - r.arrival, 5.0) for r in batch.requests]
        return [batch, *batch.requests], made

    def export(self, spans: Sequence[Any]) -> bool:
        self.began.set()
        assert self.may.wait(30)
        self.exported.append(list(spans))
        return self._works

    def shutdown(self) -> None:
        self.ended = True
        self.may.set()


def tracing(maker: Maker, **limits: str) -> Tracing:
    return Tracing(maker, Sampler(1.0), bounds=LATENCY_BOUNDS, environ={f"OTEL_BSP_{k}": v for k, v in limits.items()})


def test_what_waits_is_bounded_and_counted() -> None:
    maker = Maker()
    traces = tracing(maker, MAX_QUEUE_SIZE="3", MAX_EXPORT_BATCH_SIZE="2")
    traces.start()
    traces.put(BATCH)
    assert maker.began.wait(30)  # and goes on, so that nothing else is taken
    for _ in range(5):
        traces.put(BATCH)
    assert len(traces) == 3 and traces.counts["queue_full"] == 4
    maker.may.set()
    traces.close(30)
    assert traces.counts == {"exported": 8, "queue_full": 4, "export_failed": 0}
    assert [len(spans) for spans in maker.exported] == [2] * 4 and maker.ended


def test_a_failed_export_is_counted_and_a_record_that_makes_none_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker(works=False)
    maker.may.set()
    traces = tracing(maker)
    traces.start()
    traces.put(BATCH._replace(labels=("broken", "1")))
    traces.put(BATCH)
    traces.close(30)
    assert traces.counts == {"exported": 0, "queue_full": 0, "export_failed": 2}
    assert "spans could not be made" in caplog.text


def test_an_export_that_hangs_does_not_keep_the_server(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker()
    traces = tracing(maker, MAX_EXPORT_BATCH_SIZE="1")
    traces.start()
    traces.put(BATCH)
    assert maker.began.wait(30)
    traces.close(0.01)
    assert maker.ended and "could not be exported within 0.01 s" in caplog.text


@pytest.mark.parametrize("value", ["many", "0", "-1"])
def test_bounds_that_are_none(value: str) -> None:
    with pytest.raises(SettingsError, match=f"OTEL_BSP_MAX_QUEUE_SIZE: expected a number of at least 1, got '{value}'"):
        tracing(Maker(), MAX_QUEUE_SIZE=value)


def scraped(metrics: ModelMetrics) -> tuple[bytes, bytes]:
    registry = CollectorRegistry()
    registry.register(Exporter(metrics.snapshot))
    return generate_latest(registry), openmetrics.generate_latest(registry)


def test_exemplars_are_shown_in_their_buckets_and_only_in_openmetrics() -> None:
    metrics = ModelMetrics("m", "1")
    metrics.ran(BatchRecord([(1.0, 1)], [8], 1.25, 0.5, 2.0, 1))
    before = scraped(metrics)
    assert b" # {" not in before[1]
    maker = Maker()
    maker.may.set()
    metrics.tracing = tracing(maker)
    assert scraped(metrics) == before  # nothing was sampled yet
    metrics.tracing.start()
    metrics.tracing.put(BATCH)
    metrics.tracing.put(BATCH._replace(done=30.0))
    metrics.tracing.put(BATCH._replace(run=None))  # one that was refused is in no bucket
    metrics.tracing.close(30)
    plain, with_exemplars = scraped(metrics)
    assert plain == before[0]
    shown = [line for line in with_exemplars.decode().splitlines() if " # {" in line]
    assert [line.partition(" # ")[2] for line in shown] == [
        '{span_id="b",trace_id="a"} 1.0 5.0', '{span_id="b",trace_id="a"} 29.0 5.0',
    ]  # fmt: skip
    assert [('stage="total"' in line, line.partition('le="')[2].partition('"')[0]) for line in shown] == [
        (True, "1"), (True, "+Inf"),
    ]  # fmt: skip


def test_the_metric_of_spans_is_declared() -> None:
    samples = Scrape()
    samples.add(catalogue.SPANS_TOTAL, ("exported",), 3)
    registry = CollectorRegistry()
    registry.register(Exporter(lambda s: s.add(catalogue.SPANS_TOTAL, ("exported",), 3)))
    assert b'forwardpass_spans_total{result="exported"} 3.0' in generate_latest(registry)


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("mode", "environ", "is_wanted"),
    [
        ("auto", {}, False),
        ("auto", {"OTEL_SERVICE_NAME": "x"}, False),
        ("auto", ENDPOINT, True),
        ("auto", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ("auto", {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ("auto", ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        ("auto", ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        ("on", {}, True),
        ("on", {"OTEL_SDK_DISABLED": "true"}, False),
        ("off", ENDPOINT, False),
    ],
)
def test_when_there_is_tracing(mode: Any, environ: dict[str, str], is_wanted: bool) -> None:
    assert wanted(mode, environ) == is_wanted


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.baggage", None)
    monkeypatch.delitem(sys.modules, "forwardpass.observability.otel_spans", raising=False)
    assert open_tracing("auto", {}, LATENCY_BOUNDS) is None and not caplog.records
    assert open_tracing("auto", ENDPOINT, LATENCY_BOUNDS) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "pip install 'forwardpass[otel]'" in record.getMessage()
    with pytest.raises(SettingsError, match=r"pip install 'forwardpass\[otel\]'"):
        open_tracing("on", {}, LATENCY_BOUNDS)


# -- with OpenTelemetry -----------------------------------------------------------------------------------------------


@pytest.fixture
def spans_of() -> Callable[..., tuple[list[Any], list[Exemplar]]]:
    """`spans_of(batch, *baggage)`: what a record makes, after a way through the SDK's exporter in memory."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from forwardpass.observability.otel_spans import OtelSpans

    def make(batch: TracedBatch, *baggage: str) -> tuple[list[Any], list[Exemplar]]:
        exporter = InMemorySpanExporter()
        maker = OtelSpans(exporter, Resource({"service.name": "s"}), baggage)
        spans, exemplars = maker.spans_of(batch, 10**18)
        assert maker.export(spans)
        maker.shutdown()
        return list(exporter.get_finished_spans()), exemplars

    return make


def test_spans_of_a_batch(spans_of: Callable[..., tuple[list[Any], list[Exemplar]]]) -> None:
    root = REQUEST._replace(sampled=Sampled(0xC, 0), tracestate="", decoded=None, id_field=b"")
    (batch, first, second), exemplars = spans_of(BATCH._replace(requests=[REQUEST, root]))
    assert [(e.name, e.timestamp - 10**18) for e in first.events] == [
        ("received", 10**9), ("decoded", 1125 * 10**6), ("dequeued", 1250 * 10**6), ("ran", 1750 * 10**6),
        ("encoded", 1875 * 10**6),
    ]  # fmt: skip
    assert (first.start_time, first.end_time) == (10**18 + 10**9, 10**18 + 2 * 10**9)
    assert (first.context.trace_id, first.parent.span_id, first.parent.is_remote) == (0xA, 0xB, True)
    assert first.context.trace_state == {"k": "v"}
    assert (second.context.trace_id, second.parent) == (0xC, None)
    assert "forwardpass.request_id" in first.attributes and "forwardpass.request_id" not in second.attributes
    assert [link.context.span_id for link in batch.links] == [first.context.span_id, second.context.span_id]
    assert [link.context.span_id for s in (first, second) for link in s.links] == [batch.context.span_id] * 2
    assert batch.start_time == 10**18 + 1250 * 10**6 and batch.attributes["forwardpass.batch.closed"] == "idle"
    assert exemplars[0] == Exemplar(f"{0xA:032x}", f"{first.context.span_id:016x}", 1.0, 10**9 + 2.0)


def test_a_batch_of_many_links_so_many(spans_of: Callable[..., tuple[list[Any], list[Exemplar]]]) -> None:
    (batch, *requests), _ = spans_of(BATCH._replace(requests=[REQUEST] * 200))
    assert (len(batch.links), len(requests)) == (LINKS, 200)


def test_spans_of_what_failed_and_of_what_never_ran(
    spans_of: Callable[..., tuple[list[Any], list[Exemplar]]],
) -> None:
    failed = REQUEST._replace(outcome=("UNAVAILABLE", Reason.RUN_FAILED), origin=Origin(protocol="http"))
    (_, span), _ = spans_of(BATCH._replace(requests=[failed]))
    assert span.status.description == f"UNAVAILABLE: {Reason.RUN_FAILED}" and not span.status.is_ok
    assert (span.name, span.attributes["forwardpass.status"]) == ("POST ModelInfer", "UNAVAILABLE")
    (refused,), _ = spans_of(TracedBatch(("", ""), [failed._replace(rows=None, decoded=None)], 2.0, None))
    assert [event.name for event in refused.events] == ["received"] and not refused.links
    assert not {"forwardpass.model", "forwardpass.rows"} & refused.attributes.keys()


def test_only_baggage_that_was_asked_for(spans_of: Callable[..., tuple[list[Any], list[Exemplar]]]) -> None:
    carrying = BATCH._replace(requests=[REQUEST._replace(baggage="tier=gold,secret=x,who=%C3%A9")])
    (_, span), _ = spans_of(carrying, "tier", "who", "absent")
    found = {key: value for key, value in span.attributes.items() if key.startswith("baggage.")}
    assert found == {"baggage.tier": "gold", "baggage.who": "é"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: expected otlp or none"),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc or"),
    ],
)
def test_exporters_that_there_are_not(environ: dict[str, str], message: str) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    with pytest.raises(SettingsError, match=message):
        open_tracing("auto", environ, LATENCY_BOUNDS)
