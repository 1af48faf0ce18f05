"""A server core as a queue that serves batches, simulated event by event; and how its figures are fitted. Pure, seeded.

The model: requests arrive at random; an idle core takes all that wait, up to `max_batch`, and is busy for a + b·n
seconds with n of them; all n are answered when it is done, and `d` seconds later the client has its answer. Whatever
else stops the core (the hypervisor, the scheduler, a collector) is a stall: stalls begin at random, with durations as
they were observed. What is left out: priorities, deadlines, refusals; cores that help each other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import LoadTestError
from forwardpass.loadtest import histogram
from forwardpass.loadtest.histogram import Counts

REQUESTS = 40_000  # simulated for one answer: 360 of them lie beyond the p99
_LONG = 2.0  # a lone request that takes more than this many medians met a stall


@dataclass(frozen=True, slots=True)
class Curve:
    """One core (or GPU) with one model. Seconds; `rows` of each request that it was measured with."""

    model: str
    a: float  # of a batch, however many requests are in it
    b: float  # of each request in it
    d: float  # from there to the client, keeping nobody else waiting
    max_batch: int  # requests
    rows: float
    stalls_per_second: float
    stalls: tuple[float, ...]  # durations, as a sample

    @property
    def capacity(self) -> float:
        """Requests/s beyond which the queue grows without end."""
        lost = self.stalls_per_second * (sum(self.stalls) / len(self.stalls) if self.stalls else 0.0)
        return max(0.0, 1.0 - lost) * self.max_batch / (self.a + self.b * self.max_batch)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Any) -> Curve:
        """Raises LoadTestError where it is none."""
        try:
            return cls(**{**said, "stalls": tuple(said["stalls"])})
        except (TypeError, KeyError) as error:
            raise LoadTestError(f"not a curve that `forwardpass plan --save` wrote: {error}") from None


def simulate(curve: Curve, rate: float, seed: int = 0, requests: int = REQUESTS) -> NDArray[np.float64]:
    """Latencies in seconds of `requests` requests at `rate` a second on one core, the first tenth left out."""
    generator = np.random.default_rng(seed)
    arrivals = np.cumsum(generator.exponential(1.0 / rate, requests))
    begins, durations = _stalls(curve, float(arrivals[-1]), generator)
    done = np.empty(requests)
    times = arrivals.tolist()
    a, b, most = curve.a, curve.b, curve.max_batch
    free = 0.0
    first = stall = 0
    while first < requests:
        now = max(free, times[first])
        # Stalls that fell into an idle time keep waiting whoever arrives in them.
        while begins[stall] <= now:
            now = max(now, begins[stall] + durations[stall])
            stall += 1
        last = bisect.bisect_right(times, now, first, min(first + most, requests))
        end = now + a + b * (last - first)
        while begins[stall] < end:
            end += durations[stall]
            stall += 1
        done[first:last] = end
        free, first = end, last
    found: NDArray[np.float64] = (done - arrivals + curve.d)[requests // 10 :]
    return found


def _stalls(curve: Curve, seconds: float, generator: np.random.Generator) -> tuple[list[float], list[float]]:
    """Beginnings and durations, ended by one that never comes."""
    if not curve.stalls or not curve.stalls_per_second:
        return [math.inf], [0.0]
    # The queue may go on after the last arrival.
    count = generator.poisson(curve.stalls_per_second * (seconds * 1.5 + 10))
    begins = np.sort(generator.uniform(0, seconds * 1.5 + 10, count))
    return [*begins.tolist(), math.inf], [*generator.choice(curve.stalls, count).tolist(), 0.0]


def quantile(curve: Curve, rate: float, q: float, seed: int = 0, runs: int = 3, requests: int = REQUESTS) -> float:
    """Seconds; the median of several simulations; inf beyond the capacity."""
    if rate >= curve.capacity:
        return math.inf
    return float(np.median([np.quantile(simulate(curve, rate, seed + run, requests), q) for run in range(runs)]))


def highest_rate(curve: Curve, q: float, seconds: float, seed: int = 0) -> float:
    """The highest rate on one core whose quantile `q` is at most `seconds`; 0 where none is. Within 1 %."""
    low, high = 0.0, curve.capacity
    if quantile(curve, 0.001 * high, q, seed) > seconds:
        return 0.0
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        if quantile(curve, middle, q, seed) <= seconds:
            low = middle
        else:
            high = middle
    return low


def stalls_of(latency: Counts, seconds: float) -> tuple[float, tuple[float, ...]]:
    """Stalls a second, and a sample of their durations, from the latencies of a closed loop with one call in flight.

    Its calls follow each other without a gap, so whatever stopped the server for a while is part of one of them.
    """
    median = histogram.quantile(latency, 0.5)
    long = np.flatnonzero((latency > 0) & (median * _LONG < histogram.MIDDLES))
    durations = np.repeat(histogram.MIDDLES[long] - median, latency[long])
    if not len(durations):
        return 0.0, ()
    kept = durations if len(durations) <= 500 else np.quantile(durations, (np.arange(500) + 0.5) / 500)
    return len(durations) / seconds, tuple(round(float(d), 7) for d in kept)


@dataclass(frozen=True, slots=True)
class Observed:
    """The median latency in seconds at a rate."""

    rate: float
    median: float


def fit(
    model: str,
    rows: float,
    closed_rate: float,
    in_flight: int,
    max_batch: int,
    lone: Counts,
    seconds: float,
    observed: Sequence[Observed],
) -> Curve:
    """A curve from what was measured: `closed_rate` requests/s with `in_flight` of them, the latencies `lone` of one in
    flight over `seconds`, and medians at some rates in an open loop.

    The most that was answered fixes a + b·n; how the median grows with the rate tells a from d: what occupies the core
    makes others wait, what does not only adds.
    """
    per_second, stalls = stalls_of(lone, seconds)
    alone = histogram.quantile(lone, 0.5)
    batch = min(in_flight, max_batch)
    whole = batch / closed_rate  # seconds of a batch of `batch`
    best: tuple[float, Curve] | None = None
    for share in np.geomspace(0.02, 1.0, 18):
        a = float(share * alone)
        b = (whole - a) / batch
        if b <= 0:
            continue
        bare = Curve(model, a, b, 0.0, max_batch, rows, per_second, stalls)
        known = [(o, quantile(bare, o.rate, 0.5, runs=1, requests=5000)) for o in observed if o.rate < bare.capacity]
        d = max(0.0, float(np.median([alone - a - b, *(o.median - simulated for o, simulated in known)])))
        error = sum(math.log((simulated + d) / o.median) ** 2 for o, simulated in known)
        error += math.log((a + b + d) / alone) ** 2
        if best is None or error < best[0]:
            best = error, Curve(model, a, b, d, max_batch, rows, per_second, stalls)
    if best is None:
        raise LoadTestError(
            f"{closed_rate:,.0f} requests/s with {in_flight} in flight do not fit {alone * 1e6:.0f} µs alone"
        )
    return best[1]
