"""Quantiles and rates, from counters alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.observability.histogram import Histogram
from forwardpass.observability.model_metrics import LATENCY_BOUNDS, STAGES, ModelTotals
from forwardpass.status.rates import CounterSample, quantile, refusals, traffic

NOTHING = (0,) * (len(LATENCY_BOUNDS) + 1)


def counted(values: Sequence[float]) -> list[int]:
    histogram = Histogram(LATENCY_BOUNDS)
    histogram.record(values, [1] * len(values))
    return histogram.counts


def totals(total: Sequence[int] = NOTHING, **more: object) -> ModelTotals:
    stages = {stage: tuple(total) if stage == "total" else NOTHING for stage in STAGES}
    return ModelTotals(**{"stages": stages, "codes": {}, "reasons": {}, "rows": 0, "batches": 0, "isolated": 0, **more})


def sample(at: float, **models: ModelTotals) -> CounterSample:
    return CounterSample(at, 0.0, {(name, "1"): found for name, found in models.items()}, 0)


@given(st.lists(st.floats(1e-5, 9.0), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    found = quantile(counted(values), share)
    true = float(np.quantile(values, share, method="inverted_cdf"))
    place = int(np.searchsorted(LATENCY_BOUNDS, true))
    lower = LATENCY_BOUNDS[place - 1] if place else 0.0
    assert found is not None and lower <= found <= LATENCY_BOUNDS[place]


def test_a_quantile_is_interpolated_in_its_bucket() -> None:
    counts = list(NOTHING)
    counts[LATENCY_BOUNDS.index(2e-3)] = 4  # between 1.5 and 2 ms
    assert quantile(counts, 0.5) == pytest.approx(1.75e-3)
    assert quantile(NOTHING, 0.5) is None
    assert quantile([0] * len(LATENCY_BOUNDS) + [3], 0.5) == 10.0  # beyond the last bound, only that is known


def test_traffic_is_what_happened_between_two_samples() -> None:
    before = totals(counted([5.0] * 50), codes={"OK": 50, "INTERNAL": 1}, rows=60, batches=10)
    after = totals(
        counted([5.0] * 50 + [1.2e-3] * 30), codes={"OK": 80, "INTERNAL": 1, "NOT_FOUND": 4}, rows=180, batches=30
    )
    other = totals(codes={"OK": 7})
    then, now = sample(10.0, m=before, other=other), sample(12.0, m=after, other=other, young=totals(codes={"OK": 9}))
    found = traffic(then, now, [("m", "1")])
    assert found["requests_per_second"] == 15 and found["failed_per_second"] == 2
    assert found["rows_per_second"] == 60 and found["rows_per_batch"] == 6
    assert 1e-3 < found["stages"]["total"]["p50"] <= 1.5e-3 and found["stages"]["run"]["p99"] is None
    # One that was not there before has no rate yet, rather than that of its whole life.
    assert traffic(then, now, now.totals)["requests_per_second"] == 15
    assert traffic(then, now, [("other", "1")])["rows_per_batch"] is None


def test_counters_that_begin_anew_make_no_negative_rates() -> None:
    then, now = sample(0.0, m=totals(codes={"OK": 50}, rows=50, batches=50)), sample(1.0, m=totals(codes={"OK": 2}))
    assert traffic(then, now, [("m", "1")])["requests_per_second"] == 0


def test_refusals_by_model_and_reason() -> None:
    then = sample(0.0, m=totals(reasons={"invalid": 3}), n=totals(reasons={"draining": 1}))
    now = sample(2.0, m=totals(reasons={"invalid": 13, "too_large": 1}), n=totals(reasons={"draining": 1}))
    assert [(e["model"], e["reason"], e["total"], e["per_second"]) for e in refusals(then, now)] == [
        ("m", "invalid", 13, 5.0),
        ("m", "too_large", 1, 0.5),
        ("n", "draining", 1, 0.0),
    ]
    assert {e["per_second"] for e in refusals(None, now)} == {None}
