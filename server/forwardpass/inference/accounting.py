"""What is counted and recorded of requests that were answered: plain numbers, none of their tensors or calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from forwardpass.batching.request import Batch, Closed, Request
from forwardpass.errors import Reason, RequestError, Status
from forwardpass.inference.request import AnyRequest
from forwardpass.observability.access_log import AccessEntry, AccessLog, Origin
from forwardpass.observability.flight_record import KEPT_ID, KEPT_REQUESTS, RECEIVER, Outcome, pack, pack_single
from forwardpass.observability.flight_recorder import FlightTrack
from forwardpass.observability.model_metrics import BatchRecord
from forwardpass.transport.interface import Answer, KnowsOrigin

CANCELLED: Outcome = (Status.CANCELLED.name, Reason.CANCELLED)


def waits_of(requests: Sequence[Request]) -> Sequence[tuple[float, int]]:
    """Arrivals in the order of `requests`, each with how many in a row share it."""
    return [(arrival, len(list(same))) for arrival, same in groupby([r.arrival for r in requests])]


def record_single(flight: FlightTrack, request: AnyRequest, answer: Answer, ended: float, note: BatchRecord) -> None:
    """Record a request that ran alone, without the queue."""
    if len(note.matrices) == 1 and note.answered:
        flight.keep(pack_single(flight.number, Closed.ALONE, request, ended, note))
        return
    _, matrices, taken, run, done, answered = note
    packed = pack(
        flight.number, Closed.ALONE, RECEIVER, (taken, run, ended, done), matrices=matrices, requests=1,
        answered=answered, groups=note.waits, deadlines=[request.deadline], rows=[request.rows],
        id_fields=[request.id_field],
    )  # fmt: skip
    flight.keep(packed if answered else (packed, [_outcome(answer)]))


def record_batch(
    flight: FlightTrack,
    batch: Batch[AnyRequest],
    note: BatchRecord,
    ended: float,
    instance: int,
    *,
    answers: Sequence[Answer],
    owed: Sequence[bool],
) -> None:
    """Record a batch from the queue. `owed`: for each request, whether its client still waited."""
    waits, matrices, taken, run, done, answered = note
    requests = batch.requests
    count = len(requests)
    if count > KEPT_REQUESTS:
        requests = requests[:KEPT_REQUESTS]
    packed = pack(
        flight.number,
        batch.closed,
        instance,
        (taken, run, ended, done),
        matrices=matrices,
        requests=count,
        answered=answered,
        groups=waits,
        deadlines=[r.deadline for r in requests] if batch.dated else None,
        rows=None if batch.rows == count else [r.rows for r in requests],
        id_fields=[r.id_field for r in requests],
    )
    if answered == count:
        flight.keep(packed)
    else:
        flight.keep((packed, outcomes_of(answers[:KEPT_REQUESTS], owed[:KEPT_REQUESTS])))


def record_turn(
    flight: FlightTrack,
    batch: Batch[AnyRequest],
    ran: tuple[Sequence[int], float, float, float],
    instance: int,
    answers: Sequence[Answer],
) -> None:
    """Record a turn of a large request, as a batch which has that request only if its `answers` are there.

    `ran`: the rows of its matrices, its seconds in the network, when it ended, and when it was done.
    """
    matrices, run, ended, done = ran
    requests = batch.requests if answers else []
    answered = sum(not isinstance(answer, RequestError) for answer in answers)
    note = BatchRecord(waits_of(requests), matrices, batch.taken, run, done, answered)
    turn = dataclasses.replace(batch, requests=requests)
    record_batch(flight, turn, note, ended, instance, answers=answers, owed=[True] * len(answers))


def outcomes_of(answers: Sequence[Answer], owed: Sequence[bool]) -> list[Outcome | None]:
    """What became of each request. `owed`: whether its client still waited."""
    return [_outcome(a) if is_owed else CANCELLED for a, is_owed in zip(answers, owed, strict=True)]


def _outcome(answer: Answer) -> Outcome | None:
    return (answer.status.name, answer.reason) if isinstance(answer, RequestError) else None


def log_requests(
    access: AccessLog,
    labels: tuple[str, str],
    requests: Sequence[AnyRequest],
    answers: Sequence[Answer],
    owed: Sequence[bool],
    note: BatchRecord,
) -> None:
    """Have lines written for those requests of a batch that are sampled, and for errors. `owed`: see `outcomes_of`."""
    for request, outcome in zip(requests, outcomes_of(answers, owed), strict=True):
        if access.sampled() if outcome is None else access.error_allowed():
            arrival = request.arrival
            access.put(
                AccessEntry(
                    *labels,
                    request.id_field[: 2 * KEPT_ID],
                    request.rows,
                    outcome,
                    note.taken - arrival,
                    note.run,
                    note.done - arrival,
                    sum(note.matrices[:1]),
                    origin_of(request.reply_sink, request.call),
                )
            )


def log_refused(
    access: AccessLog,
    labels: tuple[str, str],
    requests: Sequence[AnyRequest],
    errors: Sequence[RequestError],
    now: float,
) -> None:
    """The same for requests that were rejected while they waited, or as they came."""
    for request, error in zip(requests, errors, strict=True):
        if access.error_allowed():
            waited = now - request.arrival
            outcome = error.status.name, error.reason
            origin = origin_of(request.reply_sink, request.call)
            id_field = request.id_field[: 2 * KEPT_ID]
            access.put(AccessEntry(*labels, id_field, request.rows, outcome, waited, None, waited, None, origin))


def log_undecoded(access: AccessLog, error: RequestError, origin: Origin) -> None:
    """The same for a call that was rejected before it was known which request of which model it has."""
    if access.error_allowed():
        outcome = error.status.name, error.reason
        access.put(AccessEntry("", "", b"", None, outcome, None, None, 0.0, None, origin))


def origin_of(sink: object, call: object) -> Origin:
    """Where a call came from, if its transport knows."""
    return sink.origin(call) if isinstance(sink, KnowsOrigin) else Origin()
