"""The times at which requests are due: Poisson or evenly spaced, at a rate that may change. Pure and seeded.

The schedule does not depend on responses: that is what makes the loop open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CHUNK = 1024  # requests: generating a chunk takes less time than the gap between two requests at the highest rates

Arrivals = Literal["poisson", "constant"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A time in seconds during which the rate changes linearly from `begin` to `end`, in requests per second."""

    seconds: float
    begin: float
    end: float

    @property
    def requests(self) -> float:
        return self.seconds * (self.begin + self.end) / 2


def times(
    phases: Sequence[Phase], arrivals: Arrivals, seed: int, share: int = 0, shares: int = 1
) -> Iterator[NDArray[np.float64]]:
    """Seconds from the first phase's beginning, ascending, in chunks of at most CHUNK.

    Yields the part `share` of `shares` equal ones: merged Poisson streams are Poisson again; evenly spaced ones are
    interleaved.
    """
    generator = np.random.default_rng([seed, share])
    total = sum(phase.requests for phase in phases) / shares
    at = 0.0 if arrivals == "poisson" else (share + 0.5) / shares - 1.0
    while at < total:
        if arrivals == "poisson":
            expected = at + np.cumsum(generator.exponential(1.0, CHUNK))
        else:
            expected = at + np.arange(1.0, CHUNK + 1)
        at = float(expected[-1])
        found = _inverse(phases, expected[expected < total] * shares)
        if len(found):
            yield found


def _inverse(phases: Sequence[Phase], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """The times at which the cumulative number of due requests reaches each of `expected`."""
    found = np.empty_like(expected)
    began = done = 0.0
    for number, phase in enumerate(phases):
        inside = expected >= done
        if number + 1 < len(phases):
            inside &= expected < done + phase.requests
        y = expected[inside] - done
        slope = (phase.end - phase.begin) / phase.seconds
        # Solves begin*t + slope*t*t/2 = y, in the form without cancellation when the slope is small.
        root = np.sqrt(np.maximum(phase.begin**2 + 2 * slope * y, 0.0))
        with np.errstate(invalid="ignore"):
            found[inside] = began + np.where(y > 0, 2 * y / (phase.begin + root), 0.0)
        began += phase.seconds
        done += phase.requests
    return found
