"""Error messages for rejected requests: the bound reached, or by how much a deadline is missed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from forwardpass.batching.request import QueueLimits, Request
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import DeadlineExceeded, ModelLoading, Overloaded, Reason, RequestError


def queue_full(
    request: Request,
    limits: QueueLimits,
    run_time: RunTimeModel,
    waiting: tuple[int, int, int, int],
    who: str = "the model's queue",
) -> Overloaded:
    """The error for a full queue: the bound reached, and the time until the queue should be half empty.

    `waiting`: requests, rows and bytes in the queue, and requests of this priority.
    """
    requests, rows, nbytes, peers = waiting
    if requests >= limits.requests:
        reason, what, have, more, bound = Reason.QUEUE_REQUESTS, "requests", requests, 1, limits.requests
    elif rows + request.rows > limits.rows:
        reason, what, have, more, bound = Reason.QUEUE_ROWS, "rows", rows, request.rows, limits.rows
    elif nbytes + request.nbytes > limits.nbytes:
        reason, what, have, more, bound = Reason.QUEUE_BYTES, "bytes", nbytes, request.nbytes, limits.nbytes
    else:
        reason, what = Reason.QUEUE_REQUESTS, "requests"
        have, more, bound = peers, 1, limits.by_priority[request.priority]
        who = f"the model's queue of priority {request.priority}"
    wait = rows / limits.max_batch_rows / 2 * run_time.predict(limits.max_batch_rows)
    return Overloaded(
        f"{who} is full: {have} {what} wait, the bound is {bound}, and {more} would come",
        reason=reason,
        retry_after=min(5.0, max(0.005, wait)),
    )


def deadline_missed(request: Request, now: float, why: Reason, need: float) -> DeadlineExceeded:
    """The error for a missed deadline. `why`: DEADLINE_EXPIRED if it has passed; otherwise it can no longer be met,
    since the request's rows `need` so many seconds."""
    left = (request.deadline - now) * 1e3
    if why is Reason.DEADLINE_EXPIRED:
        text = f"the deadline passed {-left:.1f} ms ago, after {(now - request.arrival) * 1e3:.1f} ms in the queue"
    else:
        text = f"the deadline is in {left:.1f} ms and {request.rows} row(s) take {need * 1e3:.1f} ms"
    return DeadlineExceeded(text, reason=why)


def queue_timed_out(request: Request, now: float) -> DeadlineExceeded:
    """The error for a request whose queue timeout ended while every instance was busy."""
    allowed, waited = (request.start_by - request.arrival) * 1e3, (now - request.arrival) * 1e3
    return DeadlineExceeded(
        f"the request waited {waited:.1f} ms for an instance and its queue timeout is {allowed:.1f} ms",
        reason=Reason.QUEUE_TIMEOUT,
    )


def reject_late(requests: Sequence[Request], answers: list[bytes | RequestError], ended: float) -> bool:
    """Replace the answers of requests whose deadline passed while they ran: their clients no longer wait.

    Returns whether there were any.
    """
    if min([request.deadline for request in requests]) >= ended:
        return False
    missed = [i for i, request in enumerate(requests) if request.deadline < ended]
    for i in missed:
        past = (ended - requests[i].deadline) * 1e3
        answers[i] = DeadlineExceeded(f"the run ended {past:.1f} ms after the deadline", reason=Reason.DEADLINE_LATE)
    return True


def being_replaced(name: str, version: str) -> ModelLoading:
    """The error for requests that arrive after a version stopped accepting any."""
    return ModelLoading(f"version {version} of model '{name}' is being replaced; try again", reason=Reason.UNLOADING)
