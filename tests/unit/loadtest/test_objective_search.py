"""The search for the highest rate, on servers whose capacity is known because they are a formula."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.loadtest.made import measured

from forwardpass.errors import LoadTestError
from forwardpass.loadtest import objective_search
from forwardpass.loadtest.measurement import Measurement


def test_objectives_are_read() -> None:
    assert objective_search.parse("p99=10ms") == objective_search.Objective(0.99, 0.01)
    assert objective_search.parse("p99.9 < 500us") == objective_search.Objective(0.999, 0.0005)
    assert str(objective_search.parse("p50=2s")) == "p50 ≤ 2 s"
    for text in ("99=10ms", "p99=10", "p99=0ms", "p100x=1ms", ""):
        with pytest.raises(ValueError, match="expected"):
            objective_search.parse(text)


def _server(capacity: float, noise: float = 0.0, seed: int = 0) -> objective_search.Measure:
    """Latencies of a queue with one server: mean 1/(capacity - rate)."""
    generator = np.random.default_rng(seed)

    def measure(rate: float, seconds: float) -> Measurement:
        now = capacity * float(np.exp(generator.normal(0, noise)))
        latency = 1.0 / (now - rate) if rate < now else 10.0
        return measured(rate=min(rate, 4000.0), latency=latency)

    return measure


def test_the_knee_is_found() -> None:
    # p99 of an exponential is 4.6 means: at most 46 ms where the mean is 10 ms, so at 100/s below the capacity.
    knee = objective_search.search(_server(3000.0), objective_search.parse("p99=46ms"), 1.0, 3)
    assert knee.rate == pytest.approx(2900, rel=0.03)
    assert knee.objective.is_met(knee.confirmed) and not knee.client_limited


def test_noise_widens_the_interval() -> None:
    knee = objective_search.search(_server(3000.0, 0.1), objective_search.parse("p99=46ms"), 1.0, 6)
    assert knee.low < knee.rate < knee.high
    assert knee.low < 2900 < knee.high * 1.1
    assert (
        knee.high / knee.low
        > objective_search.search(_server(3000.0), objective_search.parse("p99=46ms"), 1.0, 6).high / knee.rate
    )


def test_a_start_above_the_knee_goes_down() -> None:
    knee = objective_search.search(_server(300.0), objective_search.parse("p99=46ms"), 1.0, 2, start=2000.0)
    assert knee.rate == pytest.approx(200, rel=0.05)


def test_what_no_rate_meets_is_an_error() -> None:
    with pytest.raises(LoadTestError, match="not met even at"):
        objective_search.search(_server(0.5), objective_search.parse("p99=1ms"), 1.0, 2)


def test_refusing_does_not_meet_an_objective() -> None:
    refusing = measured(rate=1000, latency=0.0001, failed=100)
    assert not objective_search.parse("p99=10ms").is_met(refusing)
    assert objective_search.parse("p90=10ms").is_met(refusing)


def test_a_client_that_gives_out_first_gives_a_lower_bound() -> None:
    def measure(rate: float, seconds: float) -> Measurement:
        if rate <= 1500:
            return measured(rate=rate, latency=0.0001)
        return measured(rate=rate, latency=0.05, lag=0.04, busy=1.0)

    knee = objective_search.search(measure, objective_search.parse("p99=10ms"), 1.0, 2)
    assert knee.client_limited and knee.rate == pytest.approx(1450, rel=0.04)
