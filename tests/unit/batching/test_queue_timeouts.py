"""A queue timeout bounds the wait for an instance, and nothing else: a run may take as long as it takes.

In the queue with a clock of the test's own; in an intake whose clock stands still; and in a worker whose only instance
is busy until the test lets it go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.service import models
from tests.unit.batching.bench import LONG, Bench, reason, wait_until
from tests.unit.batching.queue_machine import Machine
from tests.unit.inference.test_intake import Sink, sent
from tests.unit.made import queued

from forwardpass.batching.request import NEVER, QUEUED, QueueLimits


def machine(a: float = 0.3, **limits: object) -> Machine:
    return Machine(QueueLimits(**{"max_batch_rows": 4, **limits}), a, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("deadlines", [True, False])
def test_an_idle_model_runs_for_longer_than_a_request_may_wait(deadlines: bool) -> None:
    m = machine(deadlines=deadlines)
    for _ in range(3):
        assert not m.offer(queued(arrival=m.now, start_by=m.now + 0.2))
        m.now += 1.0  # the thread that serves was scheduled late: an instance was free all the same
        m.take()
        m.finish()
    assert m.ran == m.requests


@pytest.mark.parametrize("deadlines", [True, False])
def test_what_waited_too_long_for_an_instance_is_rejected(deadlines: bool) -> None:
    m = machine(deadlines=deadlines)
    m.offer(queued())
    m.take()
    short, long, none = queued(start_by=0.2), queued(start_by=0.4), queued()
    m.offer(short, long, none)
    m.finish()
    batch = m.take()
    assert batch is not None and sorted(r.call for r in batch.requests) == [long.call, none.call]
    ((request, error),) = batch.dropped
    assert request is short and error.reason == "queue_timeout"
    assert str(error) == "the request waited 300.0 ms for an instance and its queue timeout is 200.0 ms"


def test_where_nothing_else_waits_the_rejected_make_an_empty_batch() -> None:
    m = machine()
    m.offer(queued())
    m.take()
    m.offer(queued(start_by=0.1), queued(start_by=0.2, stack_key="b"))
    m.finish()
    batch = m.take()
    assert batch is not None and (batch.requests, len(batch.dropped)) == ([], 2)
    m.drain()


def test_a_busy_model_need_not_come_to_an_end_for_it() -> None:
    m = machine(a=90.0)
    m.offer(queued())
    m.take()
    waiting = [queued(start_by=10.0 * (1 + i % 3)) for i in range(9)]
    m.offer(*waiting)
    m.now = 20.5
    m.expire()
    assert [r.state == QUEUED for r in waiting] == [r.start_by > 20.5 for r in waiting]
    assert m.queue.has_timeouts
    m.drain()
    assert not m.queue.has_timeouts and len(m.ran) == 1


def test_a_delayed_batch_closes_when_one_of_its_requests_may_wait_no_longer() -> None:
    m = machine(delay=0.5)
    m.offer(queued(start_by=0.2), queued(start_by=0.1))
    assert m.queue.closes_at(0.0) == 0.1
    m.cancel(m.requests[1])
    assert m.queue.closes_at(0.0) == 0.2


def test_the_shorter_wait_goes_first_within_a_priority() -> None:
    m = machine(max_batch_rows=1)
    m.offer(*(queued(start_by=s, deadline=d) for s, d in ((5.0, NEVER), (0.5, NEVER), (9.0, 0.9), (0.7, 9.0))))
    m.drain()
    assert [m.requests.index(r) for r in m.ran[:1]] == [1]
    assert sorted((r for r in m.requests), key=m.place) == [m.requests[i] for i in (1, 3, 2, 0)]


POLICY = "priority_levels = 2\n[queue_policies.1]\ntimeout_us = 50_000\n"


@pytest.mark.parametrize(
    ("options", "asked", "priority", "expected"),
    [
        ("", 0, 1, NEVER),
        ("", 300_000, 1, 0.3),
        ("default_timeout_us = 200_000", 0, 1, 0.2),
        ("default_timeout_us = 200_000", 100_000, 1, 0.1),
        ("default_timeout_us = 200_000", 300_000, 1, 0.2),  # a request may shorten it, not lengthen it
        (POLICY, 0, 1, 0.05),
        (POLICY, 10_000, 1, 0.05),
        (POLICY + "timeout_override = true", 10_000, 1, 0.01),
        (POLICY + "timeout_override = true", 90_000, 1, 0.05),
        (POLICY, 0, 2, NEVER),  # no policy of its own: the model's
        (POLICY, 10_000, 2, 0.01),
        ("default_timeout_us = 9\n" + POLICY, 0, 2, 9e-6),
    ],
)
def test_a_timeout_is_the_priorities_or_the_models_or_the_requests(
    tmp_path: Path, options: str, asked: int, priority: int, expected: float
) -> None:
    sink = Sink(tmp_path, options=options)
    request = sent()
    request.parameters["timeout"].int64_param = asked
    if priority > 1:
        request.parameters["priority"].int64_param = priority
    sink.intake.begin()
    found = sink.take(1, request, 60.0)
    assert found is not None and found.start_by - sink.now == pytest.approx(expected)
    assert found.deadline == sink.now + 60.0
    sink.run()
    assert sink.reason(1) == "answered"  # it is the only one, so it does not wait
    assert sink.repository.close(5.0)


def test_a_worker_rejects_what_no_instance_took_in_time_and_runs_what_an_idle_one_takes(
    bench: Callable[..., Bench],
) -> None:
    b = bench(models.hold(), instances=2, max_batch_rows=1)
    x = np.zeros((1, 1), np.float32)
    first = b.submit(b.request(x, wait=0.0))
    assert reason(b.sink.wait(first)[0]) == "answered"
    held = b.submit(*(b.request(np.array([[LONG]], np.float32)) for _ in range(2)))
    wait_until(lambda: b.worker.queue.running_requests == 2)
    short, long = b.submit(b.request(x, wait=0.0), b.request(x, wait=3600.0))
    b.worker.reject_timed_out()
    assert reason(b.sink.answers[short.call][0]) == "queue_timeout"
    assert long.call not in b.sink.answers
    late = b.submit(b.request(x, wait=0.0))
    b.let_go()
    assert [reason(a) for a in b.sink.wait([*late, long])] == ["queue_timeout", "answered"]
    b.sink.wait(held)
    b.settled()
    assert b.counted() == {"OK": 2, "DEADLINE_EXCEEDED": 4}


def test_a_lone_request_frees_its_instance_as_a_batch_does(bench: Callable[..., Bench]) -> None:
    b = bench(models.hold(), inline=10.0)
    x = np.zeros((1, 1), np.float32)
    held, late, last = b.request(x + np.float32(LONG)), b.request(x, wait=0.0), b.request(x)
    assert b.admission.admit(3, held.nbytes + late.nbytes + last.nbytes) is None
    runs = threading.Thread(target=b.worker.try_run_now, args=(held, time.monotonic()))
    runs.start()
    wait_until(lambda: bool(b.worker._runs.running))
    b.worker.submit([late, last], time.monotonic())
    b.let_go()
    runs.join()
    b.worker.run_pending()
    assert [reason(a) for a in b.sink.wait([late, last])] == ["queue_timeout", "answered"]
    b.settled()
