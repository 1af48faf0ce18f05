"""What the queue is for: a network of 5 ms a run, offered more than it can do, with deadlines of 50 ms.

A discrete-event simulation: Poisson arrivals, one instance, the real queue and run-time model, no real time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from tests.unit.made import exact_run_time, queued

from forwardpass.batching.batch_queue import BatchQueue
from forwardpass.batching.ordering import PATIENCE
from forwardpass.batching.request import NEVER, Batch, QueueLimits

A, B, LIMIT = 5e-3, 2e-6, 32  # seconds a run, seconds a row, rows a run
PEAK = LIMIT / (A + B * LIMIT)  # rows a second
SECONDS = 1.5  # simulated


@dataclass
class Outcome:
    """Of one simulated run. Rates are in rows a second."""

    in_time: int = 0
    answered: int = 0
    undated: list[float] = field(default_factory=list)  # seconds that requests without a deadline took
    drain: float = 0.0  # the longest of the queue, in seconds
    goodput: float = 0.0


def simulate(
    load: float,
    deadlines: bool = True,
    deadline: Callable[[random.Random], float] = lambda _: 0.05,
    rows: tuple[int, ...] = (1,),
    signatures: int = 1,
    priorities: tuple[int, ...] = (1,),
    noise: float = 0.0,
) -> Outcome:
    """Offer `load` times the peak. `noise`: a run takes up to this share longer than the fit says."""
    rng = random.Random(1)
    queue = BatchQueue(QueueLimits(max_batch_rows=LIMIT, deadlines=deadlines), exact_run_time(A, B))
    arrival, rate = 0.0, PEAK * load / (sum(rows) / len(rows))
    done, batch, found = math.inf, None, Outcome()
    while arrival < SECONDS:
        if arrival <= done:
            now = arrival
            request = queued(
                rng.choice(rows), now, now + deadline(rng), rng.choice(priorities), rng.randrange(signatures)
            )
            queue.offer([request], now)
            found.drain = max(found.drain, queue.rows / PEAK)
            arrival += rng.expovariate(rate)
        else:
            assert batch is not None
            now, done = done, math.inf
            queue.finish(batch)
            for request in batch.requests:
                found.answered += request.rows
                found.in_time += request.rows if now <= request.deadline else 0
                if request.deadline == NEVER:
                    found.undated.append(now - request.arrival)
        while done == math.inf and queue.requests:
            batch = _start(queue, now)
            if batch.requests:
                seconds = (A + B * batch.rows) * (1 + noise * rng.random())
                queue.run_time.observe(batch.rows, seconds)
                done = now + seconds
    found.goodput = found.in_time / SECONDS
    return found


def _start(queue: BatchQueue, now: float) -> Batch:
    batch = queue.take(now)
    assert batch is not None
    if batch.requests:
        queue.busy_until = now + queue.run_time.lower_bound(batch.rows)
    else:
        queue.finish(batch)
    return batch


@pytest.mark.parametrize("load", [1.2, 2.0, 5.0])
def test_under_overload_goodput_stays_near_the_peak_and_answers_are_in_time(load: float) -> None:
    found = simulate(load)
    assert found.goodput >= 0.85 * PEAK
    assert found.in_time >= 0.9 * found.answered


def test_without_the_policy_an_overloaded_server_answers_hardly_anybody_in_time() -> None:
    # What the tests above are worth: the same load, first come first served.
    assert simulate(2.0).goodput > 5 * simulate(2.0, deadlines=False).goodput


def test_below_the_peak_everybody_is_answered_in_time() -> None:
    found = simulate(0.9)
    assert found.in_time == found.answered
    assert found.goodput >= 0.85 * PEAK


@pytest.mark.parametrize(
    "traffic",
    [
        {"deadline": lambda rng: rng.choice((0.012, 0.05, 0.2))},
        {"deadline": lambda _: 0.02},
        {"rows": (1, 2, 4)},
        {"signatures": 3},
        {"priorities": (1, 2)},
    ],
    ids=["mixed deadlines", "tight deadlines", "several rows", "several signatures", "two priorities"],
)
def test_other_traffic_keeps_it_up_as_well(traffic: dict[str, object]) -> None:
    found = simulate(2.0, **traffic)  # type: ignore[arg-type]
    assert found.goodput >= 0.85 * PEAK
    assert found.in_time >= 0.9 * found.answered


def test_runs_that_vary_cost_no_more_than_they_take() -> None:
    found = simulate(2.0, noise=0.5)
    assert found.goodput >= 0.85 * PEAK / 1.25
    assert found.in_time >= 0.9 * found.answered


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_requests_without_a_deadline_among_the_others_neither_starve_nor_slow_them(share: float) -> None:
    found = simulate(2.0, deadline=lambda rng: NEVER if rng.random() < share else 0.05)
    assert found.goodput >= 0.85 * PEAK
    assert found.undated and max(found.undated) < (PATIENCE + 1) * found.drain + 10 * A
