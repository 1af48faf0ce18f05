"""The simulated queue against queueing theory, and the fit against curves that are known."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from tests.unit.loadtest.made import measured

from forwardpass.errors import LoadTestError
from forwardpass.loadtest import capacity_model, objective_search
from forwardpass.loadtest.capacity_model import LATENCY_QUANTILES, Alone, Curve, Full, Observed, Residual
from forwardpass.loadtest.generator import histogram
from forwardpass.loadtest.plan import compare, plan, typical


def _curve(a: float = 1e-3, b: float = 0.0, d: float = 0.0, max_batch: int = 1, **stalls: object) -> Curve:
    return Curve("m", a, b, d, max_batch, 1.0, float(stalls.get("per_second", 0.0)), tuple(stalls.get("stalls", ())))  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.85])
def test_without_batches_it_is_the_queue_of_the_textbooks(load: float) -> None:
    # M/D/1: the mean wait is load * service / (2 (1 - load)).
    latencies = np.concatenate([capacity_model.simulate(_curve(), load * 1000, seed) for seed in range(4)])
    assert latencies.mean() == pytest.approx(1e-3 * (1 + load / (2 * (1 - load))), rel=0.05)
    assert latencies.min() == pytest.approx(1e-3)


def test_batches_carry_a_load_beyond_one_by_one() -> None:
    curve = _curve(a=1e-3, b=1e-5, max_batch=64)
    assert curve.capacity == pytest.approx(64 / 1.64e-3)
    latencies = capacity_model.simulate(curve, 10_000)
    # Whoever arrives waits for the rest of a batch and then for the own one: between one and two batches of about
    # rate * a / (1 - rate * b) = 11 requests, 1.11 ms each.
    assert latencies.min() >= 1e-3 and latencies.max() < 3e-3
    assert np.median(latencies) == pytest.approx(1.5 * 1.11e-3, rel=0.1)


def test_a_stall_delays_all_that_arrive_in_it() -> None:
    curve = _curve(a=1e-4, max_batch=64, per_second=1.0, stalls=[0.1])
    latencies = capacity_model.simulate(curve, 1000, requests=200_000)
    assert (latencies > 0.001).mean() == pytest.approx(0.1, rel=0.2)  # a tenth of the time is stalled
    assert latencies.max() >= 0.09


def test_the_same_seed_gives_the_same_latencies() -> None:
    assert (capacity_model.simulate(_curve(), 500, 3) == capacity_model.simulate(_curve(), 500, 3)).all()


def test_beyond_the_capacity_nothing_is_promised() -> None:
    assert capacity_model.quantile(_curve(), 1001, 0.99) == math.inf
    assert capacity_model.highest_rate(_curve(), 0.99, 0.0005) == 0.0
    rate = capacity_model.highest_rate(_curve(), 0.99, 0.005)
    assert capacity_model.quantile(_curve(), rate, 0.99) <= 0.005 < capacity_model.quantile(_curve(), 1.1 * rate, 0.99)


def _observed(curve: Curve, rate: float, factor: float = 1.0) -> Observed:
    return Observed(rate, tuple(factor * capacity_model.quantile(curve, rate, q, 7) for q in LATENCY_QUANTILES))


def test_a_known_curve_is_found_again() -> None:
    true = _curve(a=200e-6, b=20e-6, d=100e-6, max_batch=64)
    closed = true.capacity
    observed = [_observed(true, share * closed) for share in (0.2, 0.45, 0.65, 0.8)]
    lone = Alone(histogram.of(np.full(1000, true.a + true.b + true.d)), 1.0)
    found = capacity_model.fit("m", 1.0, 64, Full(closed, 256, closed), lone, observed)
    for load in (0.3, 0.5, 0.7, 0.85):
        right = capacity_model.quantile(true, load * closed, 0.99)
        assert capacity_model.quantile(found, load * closed, 0.99) == pytest.approx(right, rel=0.1)


def test_what_the_simulation_lacks_is_put_in_as_measured() -> None:
    true = _curve(a=200e-6, b=20e-6, max_batch=64)
    observed = [_observed(true, share * true.capacity, 1.5) for share in (0.2, 0.4, 0.6, 0.8)]
    lone = Alone(histogram.of(np.full(1000, true.a + true.b)), 1.0)
    found = capacity_model.fit("m", 1.0, 64, Full(true.capacity, 256, true.capacity), lone, observed)
    for q in (0.5, 0.99):
        right = 1.5 * capacity_model.quantile(true, 0.5 * true.capacity, q)
        assert capacity_model.quantile(found, 0.5 * true.capacity, q) == pytest.approx(right, rel=0.1)


def test_between_two_residuals_lies_what_is_between_them() -> None:
    residuals = tuple(Residual(rate, (ratio,) * len(LATENCY_QUANTILES)) for rate, ratio in ((300, 1.0), (400, 2.0)))
    bare = _curve()
    curve = dataclasses.replace(bare, residuals=residuals)

    def ratio(rate: float) -> float:
        return capacity_model.quantile(curve, rate, 0.99) / capacity_model.quantile(bare, rate, 0.99)

    assert ratio(300) == pytest.approx(1.0, rel=0.01) and ratio(400) == pytest.approx(2.0, rel=0.01)
    assert ratio(350) == pytest.approx(math.sqrt(2), rel=0.01)
    assert ratio(100) == ratio(300)  # beyond them the nearest counts


def test_no_more_is_promised_than_an_overload_got() -> None:
    curve = dataclasses.replace(_curve(a=1e-3, b=1e-5, max_batch=64), sustained=20_000.0)
    assert curve.capacity == 20_000
    assert capacity_model.quantile(curve, 20_001, 0.99) == math.inf
    assert capacity_model.quantile(curve, 19_000, 0.99) < 0.01


def test_batches_vary_as_lone_calls_do() -> None:
    lone = histogram.of(np.concatenate([np.full(500, 0.5e-3), np.full(500, 1.5e-3), np.full(5, 0.02)]))
    varies = capacity_model.varies_of(lone)
    assert np.mean(varies) == pytest.approx(1.0) and max(varies) == pytest.approx(1.5, rel=0.01)
    # M/G/1: the mean wait grows with the square of the time's variation.
    curve = dataclasses.replace(_curve(), varies=varies)
    latencies = np.concatenate([capacity_model.simulate(curve, 700, seed) for seed in range(4)])
    assert latencies.mean() == pytest.approx(1e-3 * (1 + 0.7 * 1.25 / (2 * 0.3)), rel=0.05)


def test_a_measurement_in_which_the_client_was_late_does_not_count() -> None:
    good = [measured(latency=latency) for latency in (0.001, 0.002, 0.003)]
    late = measured(latency=0.05, lag=0.04)
    assert typical([*good, late], 0.99) == good[1].quantile(0.99)
    assert typical([late, late, good[0]], 0.99) == late.quantile(0.99)  # there is nothing better
    said = compare(_curve(a=1e-4), 1000, [*good, late], 0.99, 0)
    assert said["measurements"] == 4 and said["client_saturated"] == 1
    assert said["error"] == said["predicted_seconds"] / good[1].quantile(0.99) - 1
    assert said["lowest_seconds"] < said["measured_seconds"] < said["highest_seconds"]


def test_stalls_are_what_a_lone_call_waited_for() -> None:
    latencies = np.concatenate([np.full(1000, 1e-3), [0.05, 0.08]])
    per_second, stalls = capacity_model.stalls_of(histogram.of(latencies), 1.13)
    assert per_second == pytest.approx(2 / 1.13)
    assert stalls == pytest.approx((0.049, 0.079), rel=0.01)


def test_a_plan_has_enough_cores_and_not_many_more() -> None:
    curve = _curve(a=1e-4, b=1e-5, max_batch=64)
    planned = plan(curve, 1e6, objective_search.parse("p99=10ms"), 4, 0.0, 0)
    assert planned["cores"] % 4 == 0 and planned["pods"] == planned["cores"] / 4
    assert planned["predicted_seconds"] <= 0.0101
    assert 1e6 / planned["cores"] > 0.9 * planned["rate_per_core"]
    with pytest.raises(LoadTestError, match="cannot be met by more cores"):
        plan(curve, 1e6, objective_search.parse("p99=50us"), 1, 0.0, 0)


def test_a_curve_survives_its_file() -> None:
    curve = _curve(per_second=1.0, stalls=[0.1, 0.2])
    assert Curve.from_json(json.loads(json.dumps(curve.as_json(), allow_nan=False))) == curve
    residual = Residual(100.0, (1.0,) * len(LATENCY_QUANTILES))
    curve = dataclasses.replace(curve, sustained=900.0, residuals=(residual,), varies=(0.5, 1.5))
    assert Curve.from_json(json.loads(json.dumps(curve.as_json(), allow_nan=False))) == curve
    for said in ({"a": 1}, {**curve.as_json(), "residuals": [{}]}, []):
        with pytest.raises(LoadTestError, match="not a curve"):
            Curve.from_json(said)
