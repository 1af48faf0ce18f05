"""When requests are due: how many, how apart, and that shares of a schedule add up to it."""

from __future__ import annotations

import numpy as np
import pytest

from forwardpass.loadtest.generator.schedule import CHUNK, Phase, times


def _all(phases: list[Phase], arrivals: str, seed: int = 0, share: int = 0, shares: int = 1) -> np.ndarray:
    chunks = list(times(phases, arrivals, seed, share, shares))  # type: ignore[arg-type]
    assert all(len(chunk) <= CHUNK for chunk in chunks)
    return np.concatenate(chunks) if chunks else np.array([])


def test_constant_arrivals_are_evenly_spaced_and_shares_interleave() -> None:
    found = np.sort(np.concatenate([_all([Phase(2.0, 1000, 1000)], "constant", share=i, shares=3) for i in range(3)]))
    assert len(found) in (1999, 2000, 2001)
    assert np.allclose(np.diff(found), 0.001)


def test_poisson_gaps_are_exponential() -> None:
    found = _all([Phase(20.0, 5000, 5000)], "poisson")
    gaps = np.diff(found)
    assert abs(len(found) / 100_000 - 1) < 0.02
    # Of an exponential distribution the deviation is the mean, and 1 - 1/e lie below it.
    assert abs(gaps.std() / gaps.mean() - 1) < 0.02
    assert abs((gaps < gaps.mean()).mean() - (1 - np.exp(-1))) < 0.01


def test_a_ramp_offers_more_and_more() -> None:
    found = _all([Phase(10.0, 0.001, 1000)], "constant")
    assert len(found) == pytest.approx(5000, abs=1)
    # A straight line of rates: after t of 10 seconds (t/10)**2 of all were due.
    assert np.searchsorted(found, 5.0) == pytest.approx(1250, abs=2)
    assert (np.diff(found) > 0).all() and found[-1] <= 10.0


def test_phases_follow_each_other() -> None:
    found = _all([Phase(1.0, 100, 100), Phase(1.0, 1000, 1000), Phase(1.0, 10, 10)], "constant")
    assert np.histogram(found, [0, 1, 2, 3])[0] == pytest.approx([100, 1000, 10], abs=1)


def test_the_same_seed_gives_the_same_schedule_and_shares_differ() -> None:
    phases = [Phase(1.0, 500, 500)]
    assert (_all(phases, "poisson", 7) == _all(phases, "poisson", 7)).all()
    assert _all(phases, "poisson", 7)[0] != _all(phases, "poisson", 8)[0]
    assert _all(phases, "poisson", 7, 0, 2)[0] != _all(phases, "poisson", 7, 1, 2)[0]
