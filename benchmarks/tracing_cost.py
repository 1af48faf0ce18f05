"""What traces cost a request: turned off, 1 % of the requests sampled, all of them, by turns in one process.

    python benchmarks/tracing_cost.py [--model digits] [--slices 400]

The server's own objects without sockets, as in `stages.py`, on one core. Two costs are told apart: that on the way of
every request, which is the smallest of many short slices of each kind, taken by turns; and that of a sampled request on
the thread that makes spans and encodes them as OTLP, measured by itself. Calls have a traceparent of their own, whose
flag is that of the share that is sampled.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from bodies import request as make_message
from forwardpass.batching.admission import Admission
from forwardpass.batching.request import Closed
from forwardpass.execution.cpu_budget import available
from forwardpass.inference.intake import Intake
from forwardpass.observability.access_log import Origin
from forwardpass.observability.flight_recorder import FlightRecorder
from forwardpass.observability.model_metrics import LATENCY_BOUNDS, ModelMetrics
from forwardpass.observability.otel_spans import OtelSpans
from forwardpass.observability.trace_context import Sampler
from forwardpass.observability.tracing import TracedBatch, Tracing
from forwardpass.protocol.timings import BatchTiming
from forwardpass.repository.repository import Repository
from forwardpass.settings import Settings
from forwardpass.transport.http2.request_head import RequestHead
from forwardpass.transport.interface import Answer, PendingRequest

SLICE = 0.01  # seconds
KINDS: tuple[tuple[str, float | None], ...] = (("off", None), ("1 %", 0.01), ("all", 1.0))


class Heads:
    """A transport that knows where calls came from, as the direct one does, and drops the answers."""

    def deliver(
        self, requests: Sequence[PendingRequest[RequestHead]], answers: Sequence[Answer], timing: BatchTiming | None
    ) -> None:
        pass

    def traceparents(self, requests: Sequence[PendingRequest[RequestHead]]) -> list[bytes]:
        return [request.call.traceparent for request in requests]

    def origin(self, call: RequestHead) -> Origin:
        return Origin(call.traceparent.decode("latin-1"), None, lambda name: call.field(name.encode()).decode())


class Encoding(SpanExporter):
    """Everything that an OTLP exporter does, except sending."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


class Kept(Tracing):
    """Keeps the last record in place of a queue."""

    last: TracedBatch | None = None

    def put(self, batch: TracedBatch) -> None:
        self.last = batch


def heads(ratio: float | None, count: int = 5000) -> list[RequestHead]:
    """Calls with parents of which so many are sampled; with tracing off, as many as with 1 %."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        flag = int(draw.random() < (0.01 if ratio is None else ratio))
        parent = b"00-%032x-%016x-%02x" % (draw.getrandbits(128) | 1, draw.getrandbits(64) | 1, flag)
        fields = [(b":method", b"POST"), (b":path", b"/x"), (b"content-type", b"application/grpc")]
        found.append(RequestHead((*fields, (b"te", b"trailers"), (b"traceparent", parent))))
    return found


def measure(repository: Path, model: str, batch: int, slices: int) -> tuple[dict[str, float], float]:
    """Microseconds of a request on its way, by kind; and of a sampled one on the other thread."""
    settings = Settings(repository=repository, max_requests=1 << 40, max_bytes=1 << 60)
    admission = Admission(settings.max_requests, settings.max_bytes)
    models = Repository(settings, available(), admission)
    models.recorder = FlightRecorder(settings.flight_batches, Closed.NAMES)
    for entry in models.discover():
        if entry.name == model:
            models.load(entry)
    worker = models.resolve(model, "")
    intake: Intake[RequestHead] = Intake(Heads(), models, admission, ModelMetrics("", ""), settings.max_message_bytes)
    width = worker.signature.inputs[0].shape[1]
    message = make_message(model, np.random.default_rng(0).standard_normal((1, width)).astype("<f4"))
    maker = OtelSpans(Encoding(), Resource({"service.name": "forwardpass"}))
    made = {name: None if r is None else Kept(maker, Sampler(r), bounds=LATENCY_BOUNDS) for name, r in KINDS}
    calls = {name: heads(r) for name, r in KINDS}
    best = dict.fromkeys(made, float("inf"))
    places = dict.fromkeys(made, 0)
    for _ in range(slices):
        for name, _ratio in KINDS:
            worker.metrics.tracing = made[name]
            own, place = calls[name], places[name]
            count, began = 0, time.thread_time()
            while (spent := time.thread_time() - began) < SLICE:
                for _ in range(4):
                    intake.begin()
                    for _ in range(batch):
                        intake.take(own[place], message, None)
                        place = (place + 1) % len(own)
                    intake.flush()
                    while intake.run_pending():
                        pass
                count += 4 * batch
            places[name] = place
            best[name] = min(best[name], spent / count)
    return {name: seconds * 1e6 for name, seconds in best.items()}, exported(maker, made["1 %"])


def exported(maker: OtelSpans, tracing: Any) -> float:
    """Microseconds of one sampled request with its batch, in groups of 512 spans."""
    best = float("inf")
    for _ in range(30):
        began = time.thread_time()
        spans: list[ReadableSpan] = []
        for _ in range(256):
            spans += maker.spans_of(tracing.last._replace(requests=tracing.last.requests[:1]), time.time_ns())[0]
        maker.export(spans)
        best = min(best, (time.thread_time() - began) / 256)
    return best * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("models"))
    parser.add_argument("--model", default="digits")
    parser.add_argument("--slices", type=int, default=400, help="of 10 ms, for each kind and size of batch [400]")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print("| requests in a batch | off | 1 % | all | a sampled request and its batch, on the thread |")
    print("| --- | --- | --- | --- | --- |")
    for batch in (1, 8, 50):
        way, thread = measure(args.repository, args.model, batch, args.slices)
        print(f"| {batch} | {' | '.join(f'{spent:.2f} µs' for spent in way.values())} | {thread:.1f} µs |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
