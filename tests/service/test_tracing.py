"""Traces of a real server, as a real OTLP receiver gets them: over gRPC and HTTP, of calls by every transport."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, request, until
from http_caller import HttpCaller, tensor

from forwardpass import AsyncClient, Client, protocol
from forwardpass.client import CallError
from forwardpass.errors import ForwardpassError
from forwardpass.protocol import METHODS
from forwardpass.testing.server_process import ServerProcess

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")

from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otlp_receiver import Received, attributes, grpc_receiver, http_receiver

Serve = Callable[..., ServerProcess]
ROW = np.ones((1, 4), np.float32)
TOKEN, CONTENT = "sentinel-of-a-token", "sentinel-of-a-tensor"
METHOD = "inference.GRPCInferenceService/ModelInfer"
STEPS = ["received", "decoded", "dequeued", "ran", "encoded"]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traced")
    models.save(root, "chain", models.chain(), "max_batch_size = 64\n")
    models.save(root, "three", models.chain(), "max_batch_size = 3\nmax_queue_delay_us = 10000000\n")
    models.save(root, "words", models.echo(models.STRING, ("batch", 1)))
    return root


@pytest.fixture(scope="module", params=["direct, OTLP over gRPC", "grpcio, OTLP over HTTP"])
def traced(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Received]]:
    """A server that only the standard variables tell to trace, and its receiver."""
    transport = request.param.partition(",")[0]
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"admin {TOKEN}\n")
    with (grpc_receiver if transport == "direct" else http_receiver)() as received, pytest.MonkeyPatch.context() as env:
        env.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.endpoint)
        env.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc" if transport == "direct" else "http/protobuf")
        env.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        env.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        options = ("--transport", transport, "--tokens", str(tokens), "--trace-baggage", "tier, who")
        with ServerProcess(repository, *options) as server:
            yield server, received
            assert server.stop() == 0, server.tail()
            # grpcio logs, with a traceback, when it decodes what it has freed itself; that is no fault of tracing's.
            pairs = zip(["", *server.lines], server.lines, strict=False)
            assert not [line for before, line in pairs if "Traceback" in line and "grpc._cython" not in before], (
                server.tail()
            )


@pytest.fixture
def caller(traced: tuple[ServerProcess, Received]) -> Iterator[Caller]:
    traced[1].clear()
    made = Caller(traced[0])
    yield made
    made.close()


def parent(number: int, sampled: bool = True) -> str:
    return f"00-{number:032x}-{number:016x}-{int(sampled):02x}"


def authorized(*headers: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKEN}"), *headers)


def of(spans: Sequence[Any], trace_id: int) -> list[Any]:
    return [span for span in spans if span.trace_id == trace_id.to_bytes(16, "big")]


def batches(spans: Sequence[Any], model: str) -> list[Any]:
    return [span for span in spans if span.name == f"batch {model}"]


def settled(received: Received, caller: Caller) -> list[Any]:
    """All spans of the requests so far: those of one more request came after them."""
    marker = 0xF0000 + time.monotonic_ns() % 0xFFFF
    caller.send(request("chain", ROW), metadata=authorized(("traceparent", parent(marker))))
    return received.wait(lambda spans: bool(of(spans, marker)))


def test_a_request_with_its_parent_and_its_batch(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    _, received = traced
    before = time.time_ns()
    metadata = authorized(
        ("traceparent", parent(0xA)), ("tracestate", "vendor=value"), ("baggage", "tier=gold,secret=x")
    )
    caller.send(request("chain", np.ones((2, 4), np.float32), id="mine"), metadata=metadata)
    spans = received.wait(lambda spans: len(of(spans, 0xA)) == 1 and len(batches(spans, "chain")) == 1)
    (span,), (batch,) = of(spans, 0xA), batches(spans, "chain")
    assert (span.name, span.kind, span.parent_span_id) == (METHOD, 2, (0xA).to_bytes(8, "big"))
    assert (span.trace_state, span.status.code) == ("vendor=value", 0)
    assert attributes(span) == {
        "rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0, "forwardpass.model": "chain", "forwardpass.version": "1", "forwardpass.rows": 2,
        "forwardpass.request_id": "mine", "baggage.tier": "gold",
    }  # fmt: skip
    assert [event.name for event in span.events] == STEPS
    times = [before, span.start_time_unix_nano, *(e.time_unix_nano for e in span.events), span.end_time_unix_nano]
    assert times == sorted(times) and times[-1] < time.time_ns()
    assert [link.span_id for link in span.links] == [batch.span_id] and batch.trace_id != span.trace_id
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(span.trace_id, span.span_id)]
    assert (batch.kind, batch.parent_span_id) == (1, b"")
    found = attributes(batch)
    assert found.pop("forwardpass.batch.closed") in ("alone", "idle")
    assert found == {
        "forwardpass.model": "chain", "forwardpass.version": "1", "forwardpass.batch.rows": 2,
        "forwardpass.batch.requests": 1, "forwardpass.batch.instance": found["forwardpass.batch.instance"],
    }  # fmt: skip
    assert all(r["service.name"] == "forwardpass" and r["deployment.environment"] == "test" for r in received.resources)


def test_a_batch_links_those_that_were_in_it(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    _, received = traced

    def call(number: int) -> None:
        # The second one is not sampled by its caller: it has no span, and is counted in the batch all the same.
        caller.send(request("three", ROW), metadata=authorized(("traceparent", parent(number, number != 0xB2))))

    callers = [threading.Thread(target=call, args=(number,)) for number in (0xB1, 0xB2, 0xB3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    spans = received.wait(lambda spans: len(batches(spans, "three")) == 1 and len(of(spans, 0xB3)) == 1)
    (batch,) = batches(spans, "three")
    found = attributes(batch)
    assert (found["forwardpass.batch.requests"], found["forwardpass.batch.rows"]) == (3, 3)
    assert found["forwardpass.batch.closed"] == "full"
    (first,), (last,) = of(spans, 0xB1), of(spans, 0xB3)
    assert not of(spans, 0xB2)
    assert {link.span_id for link in batch.links} == {first.span_id, last.span_id}
    assert [link.span_id for link in (*first.links, *last.links)] == [batch.span_id] * 2
    # What waited for whom: the batch began once the last of them had come.
    starts = [span.start_time_unix_nano for span in (first, last)]
    assert batch.start_time_unix_nano >= max(starts)


def test_calls_over_http_and_without_a_parent(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    server, received = traced
    http = HttpCaller(server.http_url)
    headers = {"authorization": f"Bearer {TOKEN}"}
    body = {"inputs": [tensor(ROW)]}
    assert http.infer("chain", body, **headers).status == 200
    assert http.infer("chain", body, traceparent=parent(0xC), **headers).status == 200
    assert http.infer("chain", body, traceparent=parent(0xCC, False), **headers).status == 200
    http.close()
    spans = settled(received, caller)
    (span,) = of(spans, 0xC)
    assert (span.name, span.parent_span_id) == ("POST ModelInfer", (0xC).to_bytes(8, "big"))
    assert attributes(span).items() >= {"http.request.method": "POST", "forwardpass.status": "OK"}.items()
    assert not of(spans, 0xCC)
    (root,) = [s for s in spans if s.name == span.name and not s.parent_span_id]  # by default, all of those are traced
    assert [event.name for event in root.events] == STEPS


def test_a_stream(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    _, received = traced
    stream = caller.channel.stream_stream(METHODS["ModelStreamInfer"].path)
    messages = [request("chain", ROW).SerializeToString()] * 3
    assert len(list(stream(iter(messages), metadata=authorized(("traceparent", parent(0xD)))))) == 3
    spans = received.wait(lambda spans: len(of(spans, 0xD)) == 3)
    assert {attributes(span)["rpc.method"] for span in of(spans, 0xD)} == {"ModelStreamInfer"}


def test_what_is_refused(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    _, received = traced
    cases: dict[int, tuple[Any, str]] = {
        0xE1: (request("nobody", ROW), "NOT_FOUND"),
        0xE2: (request("chain", np.ones((1, 5), np.float32)), "INVALID_ARGUMENT"),
        0xE3: (b"\xff\xff", "INVALID_ARGUMENT"),
    }
    for number, (message, code) in cases.items():
        assert caller.refused(message, metadata=authorized(("traceparent", parent(number)))).code == code
    assert caller.refused(request("chain", ROW), metadata=(("traceparent", parent(0xE4)),)).code == "UNAUTHENTICATED"
    late = caller.refused(request("three", ROW), timeout=0.05, metadata=authorized(("traceparent", parent(0xE5))))
    assert late.code == "DEADLINE_EXCEEDED"
    codes = {0xE4: "UNAUTHENTICATED"} | {number: code for number, (_, code) in cases.items()}
    spans = received.wait(lambda spans: all(of(spans, number) for number in codes))
    for number, code in codes.items():
        (span,) = of(spans, number)
        assert (span.status.code, attributes(span)["error.type"]) == (2, code)
        assert attributes(span)["forwardpass.reason"] and [e.name for e in span.events] == ["received"]
    # One that waited was decoded. Whether the server or its client gives it up is a race.
    (span,) = of(received.wait(lambda spans: bool(of(spans, 0xE5))), 0xE5)
    assert attributes(span)["error.type"] in ("DEADLINE_EXCEEDED", "CANCELLED") and not span.links
    assert [event.name for event in span.events][:2] == ["received", "decoded"]


def test_nothing_of_tensors_or_tokens(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    _, received = traced
    word = np.array([[CONTENT]], object)
    caller.send(request("words", word), metadata=authorized(("traceparent", parent(0xF1)), ("baggage", "who=me")))
    caller.refused(request("words", word, word, names=("x", CONTENT)), metadata=authorized())
    caller.refused(request("words", word), metadata=(("authorization", "Bearer sentinel-of-a-wrong-token"),))
    settled(received, caller)
    assert b"words" in received.raw and b"baggage.who" in received.raw
    assert b"sentinel" not in received.raw


def test_histograms_have_exemplars_for_those_who_read_them(
    traced: tuple[ServerProcess, Received], caller: Caller
) -> None:
    server, received = traced
    caller.send(request("chain", ROW), metadata=authorized(("traceparent", parent(0x1E))))
    received.wait(lambda spans: bool(of(spans, 0x1E)))

    def scraped(accept: str) -> str:
        asked = urllib.request.Request(server.metrics_url, headers={"Accept": accept})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=10) as response:
            text: str = response.read().decode()
        return text

    lines = [line for line in scraped(OPENMETRICS).splitlines() if " # {" in line]
    assert [line for line in lines if f'trace_id="{0x1E:032x}"' in line], lines
    assert all(line.startswith("forwardpass_stage_seconds_bucket{") and 'stage="total"' in line for line in lines)
    assert " # {" not in scraped("text/plain")
    assert caller.metric("forwardpass_spans_total", result="exported") > 0
    assert caller.metric("forwardpass_spans_total", result="export_failed") == 0


def test_the_trace_extension_says_what_is_traced(traced: tuple[ServerProcess, Received], caller: Caller) -> None:
    path = METHODS["TraceSetting"].path

    def settings(**asked: str) -> dict[str, list[str]]:
        message = protocol.TraceSettingRequest(settings={name: {"value": [value]} for name, value in asked.items()})
        answer, _ = caller.send(message, path=path, metadata=authorized())
        return {n: list(v.value) for n, v in protocol.TraceSettingResponse.FromString(answer).settings.items()}

    now = settings(trace_level="TIMESTAMPS")
    assert (now["trace_level"], now["trace_rate"], now["trace_mode"]) == (["TIMESTAMPS"], ["1"], ["opentelemetry"])
    message = protocol.TraceSettingRequest(settings={"trace_rate": {"value": ["100"]}})
    refused = caller.refused(message, path=path, metadata=authorized())
    assert refused.code == "UNIMPLEMENTED" and "OTEL_TRACES_SAMPLER" in refused.text


@pytest.fixture(scope="module")
def finished() -> InMemorySpanExporter:
    """Where the spans of the clients of this process end. A process has one provider, so it stays."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def test_a_client_makes_spans_which_the_server_continues(
    traced: tuple[ServerProcess, Received], finished: InMemorySpanExporter
) -> None:
    server, received = traced
    received.clear()
    finished.clear()
    tracer = trace.get_tracer("test")

    async def asynchronous() -> None:
        async with AsyncClient(server.address, token=TOKEN) as client:
            await client.predict("chain", ROW)

    attached = context.attach(baggage.set_baggage("tier", "gold"))
    with tracer.start_as_current_span("outer") as outer, Client(server.address, token=TOKEN) as client:
        client.predict("chain", ROW)
        with pytest.raises(CallError):
            client.infer("nobody", ROW)
        asyncio.run(asynchronous())
        with client.stream() as stream:
            assert stream.submit("chain", ROW).result()
    context.detach(attached)
    made = [span for span in finished.get_finished_spans() if span.name == METHOD]
    trace_id = outer.get_span_context().trace_id
    assert {span.context.trace_id for span in made} == {trace_id}
    assert [span.attributes["rpc.grpc.status_code"] for span in made] == [0, 0]
    (failed,) = [s for s in finished.get_finished_spans() if s.status.status_code is trace.StatusCode.ERROR]
    assert failed.attributes["error.type"] == "NOT_FOUND" and not failed.events  # without the error's text
    spans = received.wait(lambda spans: len(of(spans, trace_id)) == 3)
    assert {attributes(span)["baggage.tier"] for span in of(spans, trace_id)} == {"gold"}
    parents = {int.from_bytes(span.parent_span_id, "big") for span in of(spans, trace_id)}
    assert parents == {*(span.context.span_id for span in made), outer.get_span_context().span_id}


def test_what_waits_is_exported_when_the_server_stops(repository: Path, serve: Serve) -> None:
    with grpc_receiver() as received, pytest.MonkeyPatch.context() as env:
        env.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", received.endpoint)
        env.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
        env.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        env.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        env.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
        server = serve(repository)
        caller = Caller(server)
        caller.send(request("chain", ROW))
        caller.send(request("chain", ROW), metadata=(("traceparent", parent(1)),))
        assert not received.spans
        assert server.stop() == 0, server.tail()
        caller.close()
        assert len(of(received.spans, 1)) == 1, server.tail()
        assert len(received.spans) == 2  # with its batch; not the request without a parent


def test_spans_that_the_receiver_refuses_are_counted(repository: Path, serve: Serve) -> None:
    with http_receiver() as received, pytest.MonkeyPatch.context() as env:
        received.refuse = True
        env.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.endpoint)
        env.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        env.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        caller = Caller(serve(repository))
        caller.send(request("chain", ROW))
        until(lambda: caller.metric("forwardpass_spans_total", result="export_failed") == 2, "the count")
        caller.close()


def test_wrong_variables_end_the_start(repository: Path) -> None:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("OTEL_TRACES_EXPORTER", "zipkin")
        with pytest.raises(ForwardpassError, match="OTEL_TRACES_EXPORTER: expected otlp or none, got 'zipkin'"):
            ServerProcess(repository)
