"""The simulated queue against queueing theory, and the fit against curves that are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from forwardpass.errors import LoadTestError
from forwardpass.loadtest import capacity, histogram, slo
from forwardpass.loadtest.capacity import Curve, Observed
from forwardpass.loadtest.plan import plan


def _curve(a: float = 1e-3, b: float = 0.0, d: float = 0.0, max_batch: int = 1, **stalls: object) -> Curve:
    return Curve("m", a, b, d, max_batch, 1.0, float(stalls.get("per_second", 0.0)), tuple(stalls.get("stalls", ())))  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.85])
def test_without_batches_it_is_the_queue_of_the_textbooks(load: float) -> None:
    # M/D/1: the mean wait is load * service / (2 (1 - load)).
    latencies = np.concatenate([capacity.simulate(_curve(), load * 1000, seed) for seed in range(4)])
    assert latencies.mean() == pytest.approx(1e-3 * (1 + load / (2 * (1 - load))), rel=0.05)
    assert latencies.min() == pytest.approx(1e-3)


def test_batches_carry_a_load_beyond_one_by_one() -> None:
    curve = _curve(a=1e-3, b=1e-5, max_batch=64)
    assert curve.capacity == pytest.approx(64 / 1.64e-3)
    latencies = capacity.simulate(curve, 10_000)
    # Whoever arrives waits for the rest of a batch and then for the own one: between one and two batches of about
    # rate * a / (1 - rate * b) = 11 requests, 1.11 ms each.
    assert latencies.min() >= 1e-3 and latencies.max() < 3e-3
    assert np.median(latencies) == pytest.approx(1.5 * 1.11e-3, rel=0.1)


def test_a_stall_delays_all_that_arrive_in_it() -> None:
    curve = _curve(a=1e-4, max_batch=64, per_second=1.0, stalls=[0.1])
    latencies = capacity.simulate(curve, 1000, requests=200_000)
    assert (latencies > 0.001).mean() == pytest.approx(0.1, rel=0.2)  # a tenth of the time is stalled
    assert latencies.max() >= 0.09


def test_the_same_seed_gives_the_same_latencies() -> None:
    assert (capacity.simulate(_curve(), 500, 3) == capacity.simulate(_curve(), 500, 3)).all()


def test_beyond_the_capacity_nothing_is_promised() -> None:
    assert capacity.quantile(_curve(), 1001, 0.99) == math.inf
    assert capacity.highest_rate(_curve(), 0.99, 0.0005) == 0.0
    rate = capacity.highest_rate(_curve(), 0.99, 0.005)
    assert capacity.quantile(_curve(), rate, 0.99) <= 0.005 < capacity.quantile(_curve(), 1.1 * rate, 0.99)


def test_a_known_curve_is_found_again() -> None:
    true = _curve(a=200e-6, b=20e-6, d=100e-6, max_batch=64)
    closed = 64 / (true.a + true.b * 64)
    observed = [Observed(r, capacity.quantile(true, r, 0.5)) for r in (0.2 * closed, 0.45 * closed, 0.65 * closed)]
    lone = histogram.of(np.full(1000, true.a + true.b + true.d))
    found = capacity.fit("m", 1.0, closed, 256, 64, lone, 1.0, observed)
    for load in (0.3, 0.5, 0.7, 0.85):
        right = capacity.quantile(true, load * true.capacity, 0.99)
        assert capacity.quantile(found, load * true.capacity, 0.99) == pytest.approx(right, rel=0.1)


def test_stalls_are_what_a_lone_call_waited_for() -> None:
    latencies = np.concatenate([np.full(1000, 1e-3), [0.05, 0.08]])
    per_second, stalls = capacity.stalls_of(histogram.of(latencies), 1.13)
    assert per_second == pytest.approx(2 / 1.13)
    assert stalls == pytest.approx((0.049, 0.079), rel=0.01)


def test_a_plan_has_enough_cores_and_not_many_more() -> None:
    curve = _curve(a=1e-4, b=1e-5, max_batch=64)
    planned = plan(curve, 1e6, slo.parse("p99=10ms"), 4, 0.0, 0)
    assert planned["cores"] % 4 == 0 and planned["pods"] == planned["cores"] / 4
    assert planned["predicted_seconds"] <= 0.0101
    assert 1e6 / planned["cores"] > 0.9 * planned["rate_per_core"]
    with pytest.raises(LoadTestError, match="cannot be met by more cores"):
        plan(curve, 1e6, slo.parse("p99=50us"), 1, 0.0, 0)


def test_a_curve_survives_its_file() -> None:
    curve = _curve(per_second=1.0, stalls=[0.1, 0.2])
    assert Curve.from_json(json.loads(json.dumps(curve.as_json()))) == curve
    with pytest.raises(LoadTestError, match="not a curve"):
        Curve.from_json({"a": 1})
