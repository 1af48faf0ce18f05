"""The run-time model: what it makes of measurements, and how far it may be trusted."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.made import exact_run_time

from forwardpass.batching.run_time_model import MAX_MARGIN, MIN_MARGIN, RunTimeModel

times = st.floats(0, 10, allow_nan=False)


def test_without_an_observation_nothing_takes_any_time() -> None:
    run_time = RunTimeModel()
    assert (run_time.predict(64), run_time.lower_bound(64), run_time.upper_bound(64)) == (0.0, 0.0, 0.0)
    assert run_time.rows_within(0.0) == math.inf
    assert run_time.rows_within(-1e-6) == 0.0


@pytest.mark.parametrize(("a", "b"), [(5e-3, 2e-6), (1e-5, 1e-6), (0.0, 1e-3), (2e-3, 0.0)])
def test_an_exact_line_is_found_exactly(a: float, b: float) -> None:
    run_time = exact_run_time(a, b)
    assert run_time.a == pytest.approx(a, abs=1e-9)
    assert run_time.b == pytest.approx(b, abs=1e-9)
    assert run_time.margin == MIN_MARGIN


def test_one_size_alone_says_nothing_of_the_slope() -> None:
    run_time = RunTimeModel()
    for _ in range(5):
        run_time.observe(8, 4e-3)
    assert (run_time.a, run_time.b) == (pytest.approx(4e-3), 0.0)
    run_time = exact_run_time(1e-3, 1e-5)
    for _ in range(2000):
        run_time.observe(8, 1e-3 + 8e-5)
    assert (run_time.a, run_time.b) == (pytest.approx(1e-3), pytest.approx(1e-5))


def test_one_slow_batch_is_not_believed() -> None:
    run_time = exact_run_time(1e-3, 0.0)
    run_time.observe(8, 100.0)
    assert run_time.predict(8) < 1.5e-3


def test_a_change_is_followed() -> None:
    run_time = exact_run_time(1e-3, 1e-5)
    for _ in range(30):
        for rows in (1, 8, 32):
            run_time.observe(rows, 3e-3 + 3e-5 * rows)
    assert run_time.predict(16) == pytest.approx(3e-3 + 3e-5 * 16, rel=0.2)


def test_the_margin_follows_the_noise() -> None:
    rng = random.Random(0)
    quiet, noisy = RunTimeModel(), RunTimeModel()
    for _ in range(300):
        rows = rng.choice((1, 8, 32))
        quiet.observe(rows, (1e-3 + 1e-5 * rows) * rng.uniform(0.98, 1.02))
        noisy.observe(rows, (1e-3 + 1e-5 * rows) * rng.uniform(0.5, 1.5))
    assert MIN_MARGIN <= quiet.margin < 0.2 < noisy.margin <= MAX_MARGIN


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 4096), times), max_size=60), st.integers(1, 4096), times)
def test_whatever_was_seen_the_answers_are_sane(seen: list[tuple[int, float]], rows: int, seconds: float) -> None:
    run_time = RunTimeModel()
    for one, took in seen:
        run_time.observe(one, took)
    assert run_time.a >= 0.0 and run_time.b >= 0.0
    assert 0.0 <= run_time.lower_bound(rows) <= run_time.predict(rows) <= run_time.upper_bound(rows) < math.inf
    assert run_time.predict(rows) <= run_time.predict(rows + 1)
    fit = run_time.rows_within(seconds)
    assert fit >= 0.0
    if 0 < fit < 1e9:
        assert run_time.upper_bound(math.floor(fit)) <= seconds * (1 + 1e-9) + 1e-12
    if fit < 1e9:
        assert run_time.upper_bound(math.floor(fit) + 1) > seconds * (1 - 1e-9) - 1e-12
