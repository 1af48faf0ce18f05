"""The histogram: how far off a value may be told, and that histograms merge."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forwardpass.errors import Status
from forwardpass.loadtest.generator import histogram
from forwardpass.loadtest.generator.recording import OUTCOMES, UNANSWERED, Recording

seconds = st.floats(1e-6, 1000.0)


@given(seconds)
def test_a_value_is_told_to_within_its_error(value: float) -> None:
    told = histogram.quantile(histogram.of(np.array([value])), 0.5)
    assert abs(told - value) <= max(0.004 * value, 0.51e-7)


@given(st.lists(seconds, min_size=1, max_size=50), st.lists(seconds, min_size=1, max_size=50))
def test_merging_is_counting_together(a: list[float], b: list[float]) -> None:
    merged = histogram.of(np.array(a)) + histogram.of(np.array(b))
    assert (merged == histogram.of(np.array(a + b))).all()


@given(st.lists(seconds, min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0]))
def test_a_quantile_is_the_value_at_its_rank(values: list[float], q: float) -> None:
    right = sorted(values)[max(1, math.ceil(q * len(values) - 1e-9)) - 1]
    assert math.isclose(histogram.quantile(histogram.of(np.array(values)), q), right, rel_tol=0.0041, abs_tol=1e-7)


def test_every_bucket_begins_where_the_one_before_ends() -> None:
    inside = histogram.BOUNDS[:-1] + 1e-3 * np.diff(histogram.BOUNDS)
    assert (histogram.places(inside) == np.arange(histogram.BUCKETS)).all()
    assert (np.diff(histogram.BOUNDS) > 0).all()


def test_extremes_have_a_place() -> None:
    assert histogram.places(np.array([-1.0, 0.0, 1e9])).tolist() == [0, 0, histogram.BUCKETS - 1]
    assert math.isnan(histogram.quantile(histogram.of(np.array([])), 0.5))


def test_what_failed_is_infinitely_late() -> None:
    counts = histogram.of(np.full(99, 0.001))
    assert histogram.quantile(counts, 0.99, failed=1) < 0.0011
    assert histogram.quantile(counts, 0.99, failed=2) == math.inf
    assert histogram.share_within(counts, 1.0, failed=1) == 0.99


def test_a_recording_counts_by_slice_and_merges() -> None:
    one, other = Recording(4), Recording(4)
    one.add_latencies(np.array([-1, 0, 3, 3, 4]), np.full(5, 0.01))
    other.add_outcome(2, UNANSWERED)
    other.add_outcome(4, UNANSWERED)  # due after the end
    one.flat += other.flat
    assert (one.ok, one.failed) == (3, 1)
    assert one.outcomes[:, Status.OK].tolist() == [1, 0, 0, 2]
    assert one.by_outcome() == {"OK": 3, "UNANSWERED": 1}
    assert one.outcomes.shape == (4, OUTCOMES) and int(one.total_latency.sum()) == 3
