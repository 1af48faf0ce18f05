"""The queue's invariants, held over random schedules with a clock of the test's own; then each rule on its own."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.batching.queue_machine import Machine
from tests.unit.made import queued

from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.request import NEVER, SETTLED, QueueLimits, Request
from forwardpass.batching.run_time_model import RunTimeModel
from forwardpass.errors import Overloaded

STEPS = ("offer", "offer", "offer", "cancel", "take", "finish", "wait", "expire")


def play(machine: Machine, rng: random.Random, steps: int, dated: float = 0.6) -> None:
    """Random steps, and then everything that is left."""
    for _ in range(steps):
        match rng.choice(STEPS):
            case "offer":
                machine.offer(*(_random(machine, rng, dated) for _ in range(rng.choice((1, 1, 1, 2, 5, 20)))))
            case "cancel" if machine.requests:
                machine.cancel(rng.choice(machine.requests[-30:]))
            case "take" if len(machine.batches) < machine.instances:
                machine.take()
            case "finish" if machine.batches:
                machine.finish()
            case "expire":
                machine.expire()
            case "wait":
                machine.wait(rng.choice((0.0, 1e-4, 2e-3, 0.02, 0.1)))
    machine.drain()


def _random(machine: Machine, rng: random.Random, dated: float) -> Request:
    deadline = NEVER
    if rng.random() < dated:
        deadline = machine.now + rng.choice((-0.001, 0.0, 1e-4, 0.005, 0.01, 0.05, 0.2)) * rng.uniform(0.5, 1.5)
    start_by = machine.now + rng.choice((0.0, 1e-3, 0.01)) if rng.random() < 0.2 else NEVER
    rows = rng.choice((1, 1, 1, 2, 3, 8, machine.limits.max_batch_rows + 3))
    priority, stack_key, nbytes = rng.choice((1, 1, 2, 3)), rng.choice("aab"), rng.choice((1, 100, 5000))
    return queued(rows, machine.now, deadline, priority, stack_key, nbytes, start_by)


def limits_for(rng: random.Random) -> QueueLimits:
    return QueueLimits(
        max_batch_rows=rng.choice((1, 4, 16, 64)),
        rows=rng.choice((8, 64, 8192)),
        requests=rng.choice((4, 30, 4096)),
        nbytes=rng.choice((5000, 1 << 20)),
        deadlines=rng.random() < 0.8,
    )


@pytest.mark.parametrize("start", range(0, 2000, 500))
def test_invariants_hold_over_thousands_of_schedules(start: int) -> None:
    for seed in range(start, start + 500):
        rng = random.Random(seed)
        machine = Machine(limits_for(rng), rng.choice((0.0, 1e-4, 5e-3)), rng.choice((0.0, 1e-5, 1e-3)), seed % 3 or 1)
        try:
            play(machine, rng, 40)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


@st.composite
def schedules(draw: st.DrawFn) -> tuple[QueueLimits, list[tuple[str, int, float, int, str]]]:
    limits = QueueLimits(max_batch_rows=draw(st.sampled_from((1, 4, 16))), rows=draw(st.sampled_from((8, 1000))))
    step = st.tuples(
        st.sampled_from(STEPS),
        st.integers(1, 20),
        st.floats(-0.001, 0.1) | st.just(NEVER),
        st.integers(1, 3),
        st.sampled_from("ab"),
    )
    return limits, draw(st.lists(step, max_size=30))


@settings(max_examples=300)
@given(schedules(), st.sampled_from((0.0, 1e-3)), st.sampled_from((0.0, 1e-3)))
def test_invariants_hold_over_whatever_hypothesis_thinks_of(
    schedule: tuple[QueueLimits, list[tuple[str, int, float, int, str]]], a: float, b: float
) -> None:
    limits, steps = schedule
    machine = Machine(limits, a, b)
    for step, number, seconds, priority, stack_key in steps:
        match step:
            case "offer":
                machine.offer(queued(number, machine.now, machine.now + seconds, priority, stack_key))
            case "cancel" if machine.requests:
                machine.cancel(machine.requests[number % len(machine.requests)])
            case "take" if not machine.batches:
                machine.take()
            case "finish" if machine.batches:
                machine.finish()
            case "wait":
                machine.wait(0.0 if seconds == NEVER else abs(seconds))
    machine.drain()


@pytest.mark.parametrize("seed", range(200))
def test_without_deadlines_it_is_first_come_first_served(seed: int) -> None:
    rng = random.Random(seed)
    machine = Machine(QueueLimits(max_batch_rows=rng.choice((1, 7, 64)), deadlines=rng.random() < 0.5), 1e-3, 1e-4)
    arrivals: Iterator[int] = iter(range(200))
    for _ in range(60):
        if rng.random() < 0.6:
            machine.now += 1e-4
            machine.offer(*(queued(rng.randint(1, 9), machine.now) for _ in range(rng.randint(1, 4)) if next(arrivals)))
        elif not machine.batches:
            machine.take()
        else:
            machine.finish()
    machine.drain()
    assert [r.call for r in machine.ran] == [r.call for r in machine.requests]


def machine(a: float = 0.01, b: float = 0.0, **limits: object) -> Machine:
    return Machine(QueueLimits(**{"max_batch_rows": 4, **limits}), a, b)  # type: ignore[arg-type]


def test_everything_there_is_taken_up_to_the_limit() -> None:
    m = machine()
    m.offer(*(queued() for _ in range(6)))
    first, second = m.take(), m.take()
    assert first is not None and second is not None
    assert (first.rows, second.rows) == (4, 2)
    assert m.queue.take(m.now) is None


def test_a_near_deadline_goes_first_within_a_priority() -> None:
    m = machine(a=1.0, max_batch_rows=1)
    late, soon, urgent = queued(priority=2), queued(deadline=2.5, priority=2), queued(deadline=9.0, priority=1)
    m.offer(late, soon, urgent)
    m.drain()
    assert m.ran == [urgent, soon, late]


def test_a_deadline_that_the_running_batch_alone_breaks_is_refused_at_once() -> None:
    m = machine(a=1.0)
    m.offer(queued())
    m.take()
    (hopeless,) = m.offer(queued(deadline=1.5))
    assert "deadline is in 1500.0 ms" in str(hopeless.error) and "1000.0 ms" in str(hopeless.error)
    assert not m.offer(queued(deadline=2.1))
    m.finish()
    assert not m.offer(queued(arrival=1.0, deadline=2.1))  # alone, it makes it


def test_what_expired_while_it_waited_is_dropped_and_says_so() -> None:
    m = machine(a=1e-3)
    waiting = queued(deadline=0.05)
    m.offer(queued(deadline=9.0), waiting)
    m.now = 0.1
    batch = m.take()
    assert batch is not None and len(batch.requests) == 1
    ((request, error),) = batch.dropped
    assert request is waiting and error.reason == "deadline_expired"
    assert "50.0 ms ago, after 100.0 ms in the queue" in str(error)


def test_nothing_is_refused_on_a_guess() -> None:
    queue = BatchQueue(QueueLimits(), RunTimeModel())  # has never seen a batch
    assert not queue.offer([queued(rows=10_000, deadline=1e-6)], 0.0)
    assert queue.offer([queued(deadline=-1e-6)], 0.0)


def test_one_request_larger_than_everything_is_taken_in_when_nothing_waits() -> None:
    m = machine(rows=10, nbytes=1000)
    assert not m.offer(queued(rows=500, nbytes=1 << 30))
    (refused,) = m.offer(queued())
    assert isinstance(refused.error, Overloaded)
    batch = m.take()
    assert batch is not None and batch.rows == 500


@pytest.mark.parametrize(
    ("bounds", "waiting", "offered", "text"),
    [
        ({"requests": 2}, [(1, 1), (1, 1)], (1, 1), "2 requests wait, the bound is 2, and 1 would come"),
        ({"rows": 10}, [(4, 1), (4, 1)], (3, 1), "8 rows wait, the bound is 10, and 3 would come"),
        ({"nbytes": 100}, [(1, 10)], (1, 95), "10 bytes wait, the bound is 100, and 95 would come"),
    ],
)
def test_the_bound_that_was_reached_is_named(
    bounds: dict[str, int], waiting: list[tuple[int, int]], offered: tuple[int, int], text: str
) -> None:
    m = machine(**bounds)
    m.offer(*(queued(rows, nbytes=nbytes) for rows, nbytes in waiting))
    (refused,) = m.offer(queued(offered[0], nbytes=offered[1]))
    assert text in str(refused.error)
    assert (
        refused.error.reason
        == "queue_" + {"requests": "requests", "rows": "rows", "nbytes": "bytes"}[next(iter(bounds))]
    )


def test_a_delayed_batch_closes_when_it_is_full_preferred_old_or_urgent() -> None:
    m = machine(delay=0.5, preferred=(2,))
    assert m.queue.closes_at(0.0) == NEVER
    m.offer(queued())
    assert m.queue.closes_at(0.2) == 0.5
    m.offer(queued(arrival=0.2))
    assert m.queue.closes_at(0.2) == 0.2  # two rows are preferred
    m.offer(queued(arrival=0.2))
    assert m.queue.closes_at(0.2) == 0.2  # and two of three
    m.offer(queued(arrival=0.2, deadline=0.3))
    assert m.queue.closes_at(0.2) == 0.2  # full
    m.cancel(m.requests[0])
    closes = m.queue.closes_at(0.2)
    assert 0.3 - 0.015 < closes < 0.3 - 0.01  # in time for the urgent one, with a margin


def test_the_largest_preferred_size_that_can_be_made_is_taken_and_everything_where_none_can() -> None:
    m = machine(max_batch_rows=8, preferred=(2, 4))
    m.offer(*(queued() for _ in range(7)))
    taken = [m.take() for _ in range(3)]
    assert [batch and batch.rows for batch in taken] == [4, 2, 1]
    m.offer(queued(3), queued(3))
    (both,) = [m.take()]
    assert both is not None and both.rows == 6
    m.offer(queued(), queued(), queued(deadline=9.0))
    dated = m.take()  # a deadline counts for more than a size that is preferred
    assert dated is not None and dated.rows == 3
    gone, kept = queued(), queued(2)
    m.offer(gone, kept)
    m.cancel(gone)
    rest = m.take()
    assert rest is not None and rest.requests == [kept]


def test_a_priority_may_have_a_bound_of_its_own() -> None:
    m = machine(by_priority={2: 2})
    low = [queued(priority=2) for _ in range(3)]
    (refused,) = m.offer(*low)
    assert refused.request is low[2] and isinstance(refused.error, Overloaded)
    assert "queue of priority 2 is full: 2 requests wait, the bound is 2" in str(refused.error)
    assert not m.offer(*(queued(priority=1) for _ in range(4)))
    m.cancel(low[0])
    assert not m.offer(queued(priority=2))
    assert [s.error.reason for s in m.offer(queued(priority=2))] == ["queue_requests"]
    m.drain()
    assert not m.offer(queued(priority=2), queued(priority=2))


def test_cancelled_requests_do_not_pile_up() -> None:
    m = machine()
    held = queued()
    m.queue.offer([held], 0.0)
    for _ in range(5000):
        gone = queued(stack_key=object())
        m.queue.offer([gone], 0.0)
        m.queue.cancel(gone)
    del gone
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o) is Request]
    assert len(kept) < 200 and m.queue.requests == 1


@pytest.mark.parametrize("count", [64, 65, 66, 99, 100])
def test_cancelled_requests_that_are_swept_up_never_run(count: int) -> None:
    m = machine(max_batch_rows=100)
    m.offer(*(queued() for _ in range(100)))
    for request in m.requests[:count]:
        m.cancel(request)
    m.drain()
    assert m.ran == m.requests[count:]


def test_clear_settles_all_that_waits_and_nothing_that_runs() -> None:
    m = machine()
    m.offer(*(queued(stack_key=s) for s in "aaaab"))
    running = m.take()
    assert running is not None and len(running.requests) == 4
    (left,) = m.queue.clear()
    assert left.state == SETTLED and left.stack_key == "b"
    assert (m.queue.requests, m.queue.rows, m.queue.nbytes) == (0, 0, 0)
    assert m.queue.finish(running) == [True] * 4


def test_equal_deadlines_keep_the_order_of_arrival() -> None:
    m = machine(a=10.0, max_batch_rows=64)
    m.offer(*(queued(deadline=15.0 + (i % 2)) for i in range(20)))
    batch = m.take()
    assert batch is not None
    assert [r.call - m.requests[0].call for r in batch.requests] == [*range(0, 20, 2), *range(1, 20, 2)]


def test_infinity_is_no_deadline() -> None:
    assert math.isinf(NEVER)
    m = machine(a=1e6)
    assert not m.offer(queued(deadline=math.inf))
