"""Why a batch closed: each reason, brought about on a clock of the test's own."""

from __future__ import annotations

import math

import pytest
from tests.unit.made import exact_run_time, queued

from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.request import Closed, QueueLimits, Request
from forwardpass.batching.run_time_model import RunTimeModel

QUICK = exact_run_time(1e-3, 1e-4)


def closed(
    limits: QueueLimits, *requests: Request, now: float = 1.0, look: float | None = None, run_time: RunTimeModel = QUICK
) -> tuple[str, int]:
    """Why the next batch closes at `now`, and its rows. `look`: when the worker asked last when it may."""
    queue: BatchQueue[Request] = BatchQueue(limits, run_time)
    assert not queue.offer(requests, 1.0)
    due = queue.closes_at(now if look is None else look)
    assert due <= now or look is not None
    batch = queue.take(now)
    assert batch is not None
    return Closed.NAMES[batch.closed], batch.rows


def many(count: int, rows: int = 1, **more: float) -> list[Request]:
    return [queued(rows, 1.0, **more) for _ in range(count)]  # type: ignore[arg-type]


def test_names_are_those_of_the_numbers() -> None:
    numbers = {name.lower(): value for name, value in vars(Closed).items() if name.isupper() and name != "NAMES"}
    assert {name: Closed.NAMES.index(name) for name in Closed.NAMES} == numbers


def test_what_there_is() -> None:
    assert closed(QueueLimits(8), *many(3)) == ("idle", 3)


@pytest.mark.parametrize(("sizes", "rows"), [([1] * 8, 8), ([1] * 9, 8), ([20], 20), ([5, 5], 5), ([3, 5], 8)])
def test_full(sizes: list[int], rows: int) -> None:
    assert closed(QueueLimits(8), *[queued(n, 1.0) for n in sizes]) == ("full", rows)
    assert closed(QueueLimits(8, delay=0.1), *[queued(n, 1.0) for n in sizes]) == ("full", rows)


def test_others_of_another_kind_do_not_make_it_full() -> None:
    assert closed(QueueLimits(8), queued(1, 1.0), *[queued(4, 1.0, stack_key="b") for _ in range(3)]) == ("idle", 1)


def test_the_queue_delay_is_over() -> None:
    assert closed(QueueLimits(8, delay=0.1), *many(3), now=1.2) == ("delay", 3)


def test_a_preferred_size() -> None:
    assert closed(QueueLimits(8, delay=0.1, preferred=(4,)), *many(5)) == ("preferred", 4)
    assert closed(QueueLimits(8, delay=0.1, preferred=(8,)), *many(8)) == ("preferred", 8)


def test_a_deadline_cuts_the_batch() -> None:
    """2.8 ms are left to half of them, and a run takes 1 ms and 0.1 ms a row: all 64 that fit would be late."""
    name, rows = closed(QueueLimits(64), *many(40, deadline=1.0028), *many(40, deadline=9.0))
    assert name == "deadline" and 1 < rows < 64


def test_a_full_batch_with_deadlines_is_full() -> None:
    assert closed(QueueLimits(8), *many(20, deadline=9.0)) == ("full", 8)
    assert closed(QueueLimits(8), *many(4, rows=3, deadline=9.0)) == ("full", 6)


def test_a_deadline_ends_the_queue_delay() -> None:
    assert closed(QueueLimits(8, delay=0.5), *many(2), queued(1, 1.0, 1.1), now=1.099)[0] == "deadline"


def test_a_queue_timeout_ends_the_queue_delay() -> None:
    assert closed(QueueLimits(8, delay=0.5), *many(2), queued(1, 1.0, start_by=1.1), now=1.1) == ("queue_timeout", 3)


def test_a_worker_that_ends_waits_for_nothing() -> None:
    assert closed(QueueLimits(8, delay=0.5), *many(2), now=1.1, look=1.1) == ("ending", 2)


def test_a_batch_says_its_bytes_and_whether_deadlines_were_among_those_waiting() -> None:
    for deadline, dated in ((math.inf, False), (9.0, True)):
        queue: BatchQueue[Request] = BatchQueue(QueueLimits(8), QUICK)
        queue.offer([queued(1, 1.0, nbytes=30), queued(1, 1.0, deadline, nbytes=12)], 1.0)
        batch = queue.take(1.0)
        assert batch is not None and (batch.nbytes, batch.dated) == (42, dated)
