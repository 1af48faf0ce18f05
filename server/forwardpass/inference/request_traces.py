"""Records for `observability.tracing` of sampled requests: plain values, none of their tensors or calls."""

from __future__ import annotations

from collections.abc import Sequence

from forwardpass.batching.request import Closed
from forwardpass.errors import RequestError
from forwardpass.inference.accounting import CANCELLED, origin_of, outcomes_of
from forwardpass.inference.request import AnyRequest
from forwardpass.observability.access_log import Origin
from forwardpass.observability.flight_record import KEPT_ID, RECEIVER, Outcome
from forwardpass.observability.model_metrics import BatchRecord, ModelMetrics
from forwardpass.observability.trace_context import Sampled
from forwardpass.observability.tracing import TracedBatch, TracedRequest, TracedRun, Tracing
from forwardpass.transport.interface import Answer

Chosen = list[tuple[int, Sampled]]  # places among the requests


def trace_batch(
    metrics: ModelMetrics,
    requests: Sequence[AnyRequest],
    answers: Sequence[Answer],
    owed: Sequence[bool],
    note: BatchRecord,
    ended: float,
    *,
    closed: int = Closed.ALONE,
    instance: int = RECEIVER,
) -> None:
    """Have spans made of the batch and of those of its requests that are sampled. `owed`: see `outcomes_of`."""
    tracing = metrics.tracing
    assert tracing is not None
    chosen = _sampled(tracing, requests)
    if chosen:
        outcomes = outcomes_of(answers, owed)
        traced = [_traced(tracing, requests[place], sampled, outcomes[place]) for place, sampled in chosen]
        matrices = note.matrices
        run = TracedRun(
            note.taken, note.run, ended, sum(matrices[:1]), len(matrices), len(requests), Closed.NAMES[closed], instance
        )
        tracing.put(TracedBatch(metrics.labels, traced, note.done, run))


def trace_refused(
    tracing: Tracing,
    labels: tuple[str, str],
    requests: Sequence[AnyRequest],
    errors: Sequence[RequestError | None],
    now: float,
) -> None:
    """The same for requests that were rejected or, without an error, cancelled while they waited, or as they came."""
    chosen = _sampled(tracing, requests)
    if chosen:
        traced = [_traced(tracing, requests[place], sampled, _outcome(errors[place])) for place, sampled in chosen]
        tracing.put(TracedBatch(labels, traced, now, None))


def trace_undecoded(tracing: Tracing, error: RequestError, origin: Origin, times: tuple[float, float]) -> None:
    """The same for a call that was rejected before it was known which request of which model it has.

    `times`: when it arrived and when it was rejected.
    """
    sampled = tracing.decide(origin.traceparent)
    if sampled is not None:
        arrival, now = times
        state, baggage = _headers(tracing, origin, sampled)
        origin = origin._replace(peer=None, header=None)
        request = TracedRequest(sampled, origin, state, baggage, b"", None, arrival, None, _outcome(error))
        tracing.put(TracedBatch(("", ""), [request], now, None))


def _sampled(tracing: Tracing, requests: Sequence[AnyRequest]) -> Chosen:
    """For every request of every batch, so kept short: most are not sampled."""
    sink = requests[0].reply_sink
    if len(requests) == 1 or len({request.reply_sink for request in requests}) == 1:
        headers = _traceparents(sink, requests)
    else:
        headers = [_traceparents(request.reply_sink, [request])[0] for request in requests]
    return tracing.choose(headers)


def _traceparents(sink: object, requests: Sequence[AnyRequest]) -> Sequence[bytes]:
    read = getattr(sink, "traceparents", None)  # a Protocol's isinstance takes microseconds
    found: Sequence[bytes] = [b""] * len(requests) if read is None else read(requests)
    return found


def _traced(tracing: Tracing, request: AnyRequest, sampled: Sampled, outcome: Outcome | None) -> TracedRequest:
    origin = origin_of(request.reply_sink, request.call)
    decoded = getattr(request, "decoded", None)  # not set of requests that came before tracing was
    id_field = request.id_field[: 2 * KEPT_ID]
    state, baggage = _headers(tracing, origin, sampled)
    origin = origin._replace(peer=None, header=None)  # which refer to the call
    return TracedRequest(sampled, origin, state, baggage, id_field, request.rows, request.arrival, decoded, outcome)


def _headers(tracing: Tracing, origin: Origin, sampled: Sampled) -> tuple[str, str]:
    """The tracestate of the parent, and the baggage if it is recorded."""
    if origin.header is None:
        return "", ""
    return origin.header("tracestate") if sampled.parent_id else "", origin.header("baggage") if tracing.baggage else ""


def _outcome(error: RequestError | None) -> Outcome:
    return CANCELLED if error is None else (error.status.name, error.reason)
