"""Chooses the waiting requests for a batch when there are deadlines. Pure: no queue, no clock, no mutation.

`live` are requests of one stack key in the queue's order, `limit` the rows of a full batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from forwardpass.batching.request import NEVER, SETTLED, Request, RequestT
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import Reason


def survey(
    group: Sequence[RequestT],
    limit: int,
    run_time: RunTimeModel,
    trust: float,
    now: float,
    *,
    live: list[RequestT],
    late: list[tuple[RequestT, Reason]],
) -> tuple[int, int]:
    """Sort `group` into `live` and `late` until `live` has `limit` rows. Returns how many were seen and left out.

    `trust`: the share of a predicted run that a request must have time for, or it is late.
    """
    soonest, each = now + run_time.a * trust, run_time.b * trust  # as RunTimeModel.lower_bound, without the calls
    rows = sum([r.rows for r in live])
    seen = dead = 0
    for request in group:
        if rows >= limit:
            break
        seen += 1
        if request.state == SETTLED:
            dead += 1
        elif request.deadline <= now:
            late.append((request, Reason.DEADLINE_EXPIRED))
        elif request.deadline < soonest + each * request.rows:
            late.append((request, Reason.DEADLINE_HOPELESS))
        else:
            live.append(request)
            rows += request.rows
    return seen, dead


def fill_batch(live: Sequence[Request], limit: int, run_time: RunTimeModel, now: float) -> tuple[int, int, int]:
    """Fill a batch greedily from the front. Returns its requests, its rows, and the rows left in the matrix.

    A request joins while the batch including it is still expected to meet its earliest deadline. 0 rows left means
    that the matrix is full, not that a deadline closed it.
    """
    rows = live[0].rows
    earliest = live[0].deadline
    count = 1
    within = run_time.rows_within
    allowed = NEVER if earliest == NEVER else within(earliest - now)
    for request in live[1:limit]:
        total = rows + request.rows
        if total > limit:
            return count, rows, 0
        if request.deadline < earliest:
            earliest = request.deadline
            allowed = within(earliest - now)
        if total > allowed:
            return count, rows, limit - rows
        rows = total
        count += 1
    return count, rows, max(0, limit - rows)


def all_in_time(live: Sequence[Request], limit: int, run_time: RunTimeModel, free_at: float) -> bool:
    """Whether all of `live` would meet their deadlines, run in order in full batches from `free_at` on."""
    predict = run_time.predict
    rows, earliest = 0, NEVER
    for request in live:
        if rows and rows + request.rows > limit:
            free_at += predict(rows)
            if free_at > earliest:
                return False
            rows, earliest = 0, NEVER
        rows += request.rows
        if request.deadline < earliest:
            earliest = request.deadline
    return free_at + predict(rows) <= earliest


def best_batch(live: Sequence[RequestT], limit: int, run_time: RunTimeModel, now: float) -> list[RequestT]:
    """Under overload, the batch with the most rows per second that meets its deadlines, in the queue's order.

    Requests with less time left than the batch takes are left out: within the first request's priority, the
    deadline threshold is the one that gives the most rows per second. They keep their place, and expire there
    unless the load falls. Empty when no batch is in time.
    """
    a, b, within = run_time.a, run_time.b, run_time.rows_within
    waiting = sum([r.rows for r in live])
    threshold, highest = NEVER, 0.0
    for request in sorted([r for r in live if r.priority == live[0].priority], key=attrgetter("deadline")):
        fits = min(max(limit, request.rows), waiting, within(request.deadline - now))
        waiting -= request.rows
        if fits >= request.rows and (rate := fits / (a + b * fits + 1e-9)) > highest * 1.0001:
            threshold, highest = request.deadline, rate
            if fits >= limit:
                break
    allowed = within(threshold - now)
    chosen, rows = list[RequestT](), 0
    for request in live:
        if request.deadline >= threshold and request.rows <= allowed:
            rows += request.rows
            if chosen and rows > min(limit, allowed):
                break
            chosen.append(request)
    return chosen
