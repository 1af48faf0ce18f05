"""Counts of values by upper bound, as Prometheus expects them. A leaf: independent of any metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Exemplar(NamedTuple):
    """A trace as the example of one value in a bucket."""

    trace_id: str  # hexadecimal
    span_id: str
    value: float
    timestamp: float  # seconds since 1970


class Histogram:
    """Counts of values by upper bound. Not thread-safe by itself."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def record(self, values: Sequence[float], times: Sequence[int]) -> None:
        """Count each of `values` the number of times given in `times`."""
        places = np.searchsorted(self.bounds, values)
        for place, count in enumerate(np.bincount(places, times, len(self.counts)).tolist()):
            self.counts[place] += int(count)
        self.total += float(np.dot(values, times))

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds with cumulative counts, as Prometheus expects them."""
        found: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            found.append(("+Inf" if bound == float("inf") else f"{bound:g}", running))
        return found
