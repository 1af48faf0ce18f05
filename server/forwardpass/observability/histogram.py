"""Counts of values by upper bound, as Prometheus expects them. A leaf: independent of any metric."""

from __future__ import annotations

import functools
import itertools
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

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, int]]:
        """Upper bounds with cumulative counts, as Prometheus expects them."""
        return list(zip(_names(tuple(self.bounds)), itertools.accumulate(self.counts), strict=True))


@functools.lru_cache(maxsize=64)
def _names(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(f"{bound:g}" for bound in bounds), "+Inf")
