"""The condition on latency: read strictly, judged by differences of histograms, with a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest

from forwardpass.observability.histogram import Histogram
from forwardpass.observability.latency_watch import BETWEEN_SECONDS, LatencyCondition, LatencyWatch, above
from forwardpass.observability.model_metrics import LATENCY_BOUNDS

M = ("m", "1")


@pytest.mark.parametrize(
    ("text", "quantile", "seconds"),
    [("p99>20ms", 0.99, 0.02), ("p99.9>500us", 0.999, 5e-4), ("p50>1.5s", 0.5, 1.5), ("p5>10s", 0.05, 10.0)],
)
def test_conditions(text: str, quantile: float, seconds: float) -> None:
    found = LatencyCondition.parse(text, LATENCY_BOUNDS)
    assert (found.quantile, found.seconds) == (pytest.approx(quantile), pytest.approx(seconds))


@pytest.mark.parametrize(
    "text",
    [
        "", "p99", "p99>20", "p99<20ms", "p99 > 20ms", "P99>20ms", "p100>20ms", "p0>20ms", "p99>20ms ", "p99>-1ms",
        "p99>1e3ms", "p99>11s", "p99>1us", "p99>20min", "p.9>20ms", "99>20ms", "p99>>20ms", "p99>20ms\n", "p٩٩>20ms",
    ],
)  # fmt: skip
def test_anything_else_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected pQ>LIMIT"):
        LatencyCondition.parse(text, LATENCY_BOUNDS)


def test_above_agrees_with_the_values_where_a_bound_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(-6, 2, 5000)
    histogram = Histogram(LATENCY_BOUNDS)
    histogram.record(values.tolist(), [1] * len(values))
    for bound in LATENCY_BOUNDS:
        assert above(bound, LATENCY_BOUNDS, histogram.counts) == np.sum(values > bound)
    between = above(0.025, LATENCY_BOUNDS, histogram.counts)
    assert np.sum(values > 0.03) < between < np.sum(values > 0.02)


class Watched:
    """A watch over one model's histogram, and what it fired."""

    def __init__(self, text: str) -> None:
        self.histogram = Histogram(LATENCY_BOUNDS)
        self.fired: list[str] = []
        condition = LatencyCondition.parse(text, LATENCY_BOUNDS)
        self.watch = LatencyWatch(
            condition, LATENCY_BOUNDS, lambda: {M: list(self.histogram.counts)}, self.fired.append
        )

    def second(self, now: float, fast: int, slow: int) -> int:
        """A second with so many requests of 1 ms and of 40 ms; how often it has fired."""
        self.histogram.record([1e-3, 40e-3], [fast, slow])
        self.watch.look(now)
        return len(self.fired)


def test_it_fires_above_the_quantile_and_not_at_it() -> None:
    watched = Watched("p99>20ms")
    assert watched.second(1.0, 990, 10) == 0  # exactly one in a hundred: the 99th percentile is fast
    assert watched.second(2.0, 989, 11) == 1
    assert Watched("p90>20ms").second(0.0, 90, 10) == 0 and Watched("p99.9>20ms").second(0.0, 999, 1) == 0
    assert watched.fired == ["p99>20ms: 11 of 1000 requests of model m version 1 took longer"]


def test_only_the_last_interval_counts() -> None:
    watched = Watched("p99>20ms")
    watched.histogram.record([40e-3], [10_000])
    watched.watch.look(0.0)
    assert len(watched.fired) == 1
    watched = Watched("p99>20ms")
    watched.second(0.0, 100_000, 0)
    assert watched.second(1.0, 98, 2) == 1  # 2 % of this second, next to nothing of all
    assert watched.second(2.0, 0, 0) == 1  # nothing happened


def test_it_fires_once_a_minute_at_most() -> None:
    watched = Watched("p50>20ms")
    fired = [watched.second(float(now), 0, 10) for now in range(180)]
    assert fired == [1 + now // int(BETWEEN_SECONDS) for now in range(180)]


def test_a_model_that_comes_later_counts_from_its_start_and_one_that_goes_is_forgotten() -> None:
    counts: dict[tuple[str, str], list[int]] = {}
    fired: list[str] = []
    watch = LatencyWatch(
        LatencyCondition.parse("p50>20ms", LATENCY_BOUNDS), LATENCY_BOUNDS, lambda: dict(counts), fired.append
    )
    counts["new", "3"] = [0] * len(LATENCY_BOUNDS) + [4]
    watch.look(0.0)
    assert fired == ["p50>20ms: 4 of 4 requests of model new version 3 took longer"]
    counts.clear()
    watch.look(100.0)
    assert len(fired) == 1
