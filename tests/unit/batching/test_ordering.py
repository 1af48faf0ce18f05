"""Who waits for whom: simulated clients on one queue, with a clock of the test's own. No deadline delays its owner, and
none delays others beyond the bound."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from tests.unit.batching.queue_machine import Machine
from tests.unit.made import Numbered, queued

from forwardpass.batching.ordering import PATIENCE
from forwardpass.batching.request import NEVER, SETTLED, QueueLimits

A, B, LIMIT = 1e-3, 1e-4, 8  # seconds a run, seconds a row, rows a run
FULL = A + B * LIMIT


@dataclass
class Caller:
    """Clients of one kind, each of which has `window` requests under way. What was answered took `waits` seconds."""

    window: int
    left: Callable[[random.Random], float]  # seconds that a request's deadline is away
    waits: list[float] = field(default_factory=list)
    missed: int = 0


def serve(callers: Sequence[Caller], seconds: float, instances: int = 1, seed: int = 0) -> float:
    """Answer them for simulated `seconds`. Returns the longest drain time of the queue that there was."""
    rng = random.Random(seed)
    machine = Machine(QueueLimits(max_batch_rows=LIMIT), A, B, instances)
    waiting: list[tuple[Numbered, Caller]] = []
    longest = 0.0
    while machine.now < seconds:
        for caller in callers:
            for _ in range(caller.window - sum(of is caller for _, of in waiting)):
                request = queued(arrival=machine.now, deadline=machine.now + caller.left(rng))
                machine.offer(request)
                waiting.append((request, caller))
        while machine.queue.requests and len(machine.batches) < instances:
            machine.take()
        longest = max(longest, (machine.queue.rows + machine.queue.running_rows) / LIMIT * FULL / instances)
        if machine.batches:
            machine.finish()
        for request, caller in waiting:
            if request.state == SETTLED and request.call in machine.answered:
                caller.waits.append(machine.now - request.arrival)
            elif request.state == SETTLED:
                caller.missed += 1
        waiting = [(request, caller) for request, caller in waiting if request.state != SETTLED]
        machine.requests = [request for request, _ in waiting]
    return longest


def never(_: random.Random) -> float:
    return NEVER


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("seconds", [0.5, 5.0, 20.0])
def test_a_far_deadline_waits_no_longer_than_none(seconds: float, instances: int) -> None:
    crowd, dated, undated = Caller(200, never), Caller(1, lambda _: seconds), Caller(1, never)
    drain = serve([crowd, dated, undated], 1.5, instances)
    assert dated.waits and undated.waits and not dated.missed
    assert max(dated.waits) <= max(undated.waits) + FULL
    assert max(dated.waits) <= drain + 2 * FULL  # served in its turn


def test_a_deadline_that_its_turn_would_miss_goes_before_the_others() -> None:
    crowd, urgent = Caller(200, never), Caller(2, lambda _: 0.02)
    drain = serve([crowd, urgent], 1.5)
    assert drain > 2 * 0.02
    assert len(urgent.waits) > 100 and not urgent.missed


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("left", [0.004, 0.02, 0.2])
def test_a_stream_of_near_deadlines_starves_no_others(left: float, instances: int) -> None:
    crowd, patient = Caller(150, lambda _: left), Caller(5, never)
    drain = serve([crowd, patient], 1.5, instances)
    assert len(patient.waits) > 10
    assert max(patient.waits) <= (PATIENCE + 1) * drain + 3 * FULL


def kinds() -> Iterator[Callable[[random.Random], float]]:
    yield never
    yield lambda rng: rng.choice((0.004, 0.02, 0.1, 20.0))
    yield lambda rng: rng.uniform(0.0, 0.3)
    yield lambda rng: NEVER if rng.random() < 0.5 else 0.05


@pytest.mark.parametrize("seed", range(40))
def test_whatever_deadlines_are_stated_nobody_waits_beyond_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    callers = [Caller(rng.choice((1, 10, 60)), left) for left in kinds()]
    drain = serve(callers, 0.6, rng.choice((1, 2, 3)), seed)
    assert max(wait for caller in callers for wait in caller.waits) <= (PATIENCE + 1) * drain + 3 * FULL


@pytest.mark.parametrize("seed", range(20))
def test_those_without_a_deadline_keep_their_order_whoever_overtakes_them(seed: int) -> None:
    rng = random.Random(seed)
    machine = Machine(QueueLimits(max_batch_rows=LIMIT), A, B)
    for _ in range(150):
        left = rng.choice((NEVER, NEVER, 20.0, 0.01, 0.05))
        machine.offer(
            *(queued(arrival=machine.now, deadline=machine.now + left) for _ in range(rng.choice((1, 1, 20))))
        )
        machine.wait(rng.choice((0.0, 1e-3, 0.01)))
        if len(machine.batches) < 1:
            machine.take()
    machine.drain()
    patient = [r.call for r in machine.ran if r.deadline - r.arrival > 10.0]
    assert patient == sorted(patient)
