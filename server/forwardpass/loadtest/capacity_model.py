"""A server core as a queue that serves batches, simulated event by event; and how its figures are fitted. Pure, seeded.

The model: requests arrive at random; an idle core takes all that wait, up to `max_batch`, and is busy for a·x + b·n
seconds with n of them, x drawn from how much lone calls vary; all n are answered when it is done, and `d` seconds later
the client has its answer. Whatever else stops the core (the hypervisor, the scheduler, a collector) is a stall: stalls
begin at random, with durations as they were observed. What is left out (a kernel and several threads that share the
core, flow control, priorities, refusals, cores that help each other) is put in as it was measured: by how much
latencies at some loads differed from the simulated ones.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import LoadTestError
from forwardpass.loadtest.generator import histogram
from forwardpass.loadtest.generator.histogram import Counts

REQUESTS: Final = 40_000  # simulated for one answer, at least: 360 of them lie beyond the p99
SECONDS: Final = 10.0  # simulated for one answer, at least: stalls are rare
LATENCY_QUANTILES: Final = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # at which residuals are kept
_LONG: Final = 4.0  # a lone request that takes more than this many medians met a stall
_KEPT: Final = 500  # values of a sample
_NEARBY: Final = 0.06  # of the highest rate: how far away a residual counts


@dataclass(frozen=True, slots=True)
class Residual:
    """Measured latency over simulated at a rate in requests/s, for each of LATENCY_QUANTILES."""

    rate: float
    ratios: tuple[float, ...]


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
    varies: tuple[float, ...] = (1.0,)  # factors of `a`, as a sample
    sustained: float = math.inf  # requests/s that were answered while more were offered
    residuals: tuple[Residual, ...] = ()  # by rate
    client_limited: bool = False  # `sustained` is what the client could do

    @property
    def capacity(self) -> float:
        """Requests/s beyond which the queue grows without end."""
        fitted = _going(self.stalls_per_second, self.stalls) * self.max_batch / (self.a + self.b * self.max_batch)
        return min(self.sustained, fitted)

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        # JSON has no infinity: never offered more than was answered.
        return {**said, "sustained": said["sustained"] if math.isfinite(said["sustained"]) else None}

    @classmethod
    def from_json(cls, said: Any) -> Curve:
        """Raises LoadTestError where it is none."""
        try:
            residuals = tuple(Residual(r["rate"], tuple(r["ratios"])) for r in said["residuals"])
            sustained = math.inf if said["sustained"] is None else said["sustained"]
            samples = {"stalls": tuple(said["stalls"]), "varies": tuple(said["varies"])}
            return cls(**{**said, **samples, "sustained": sustained, "residuals": residuals})
        except (TypeError, KeyError) as error:
            raise LoadTestError(f"not a curve that this version of `forwardpass plan --save` wrote: {error}") from None


def simulate(curve: Curve, rate: float, seed: int = 0, requests: int = REQUESTS) -> NDArray[np.float64]:
    """Latencies in seconds of `requests` requests at `rate` a second on one core, the first tenth left out.

    Without the residuals.
    """
    generator = np.random.default_rng(seed)
    arrivals = np.cumsum(generator.exponential(1.0 / rate, requests))
    begins, durations = _stalls(curve, float(arrivals[-1]), generator)
    fixed = (curve.a * generator.choice(curve.varies, requests)).tolist()
    done = np.empty(requests)
    times = arrivals.tolist()
    b, most = curve.b, curve.max_batch
    free = 0.0
    first = stall = 0
    while first < requests:
        now = max(free, times[first])
        # Stalls that fell into an idle time keep waiting whoever arrives in them.
        while begins[stall] <= now:
            now = max(now, begins[stall] + durations[stall])
            stall += 1
        last = bisect.bisect_right(times, now, first, min(first + most, requests))
        end = now + fixed[first] + b * (last - first)
        while begins[stall] < end:
            end += durations[stall]
            stall += 1
        done[first:last] = end
        free, first = end, last
    found: NDArray[np.float64] = (done - arrivals + curve.d)[requests // 10 :]
    return found


def _stalls(curve: Curve, seconds: float, generator: np.random.Generator) -> tuple[list[float], list[float]]:
    """Beginnings and durations, ended by one that never comes.

    One in each of equal stretches of time, with durations spread evenly over the sample: a simulation of some seconds
    has few stalls, and that they are as many and as long as they were observed must not be left to chance.
    """
    if not curve.stalls or not curve.stalls_per_second:
        return [math.inf], [0.0]
    # The queue may go on after the last arrival.
    count = math.ceil(curve.stalls_per_second * (seconds * 1.5 + 10))
    begins = (np.arange(count) + generator.uniform(0, 1, count)) / curve.stalls_per_second
    turns = math.ceil(count / len(curve.stalls))
    durations = np.concatenate([generator.permutation(curve.stalls) for _ in range(turns)])[:count]
    return [*begins.tolist(), math.inf], [*durations.tolist(), 0.0]


@functools.lru_cache(maxsize=512)
def _simulated(curve: Curve, rate: float, seed: int) -> Counts:
    return histogram.of(simulate(curve, rate, seed, max(REQUESTS, int(rate * SECONDS))))


def quantile(curve: Curve, rate: float, q: float, seed: int = 0) -> float:
    """Seconds, by simulation and by what was measured around that rate; inf beyond the capacity."""
    if rate >= curve.capacity:
        return math.inf
    return histogram.quantile(_simulated(curve, rate, seed), q) * _ratio(curve, rate, q)


def _ratio(curve: Curve, rate: float, q: float) -> float:
    """The residual at a rate and a quantile: a straight line through those measured nearby, so that one's noise counts
    less; beyond them the last one's."""
    if not curve.residuals:
        return 1.0
    rates = np.array([residual.rate for residual in curve.residuals])
    rate = float(np.clip(rate, rates.min(), rates.max()))
    nines = -np.log1p(-np.array(LATENCY_QUANTILES))
    logs = [np.interp(-math.log1p(-min(q, 0.999999)), nines, np.log(one.ratios)) for one in curve.residuals]
    weights = np.exp(-(((rates - rate) / (_NEARBY * rates.max())) ** 2) / 2)
    middle, level = np.average(rates, weights=weights), np.average(logs, weights=weights)
    spread = np.average((rates - middle) ** 2, weights=weights)
    slope = np.average((rates - middle) * (logs - level), weights=weights) / spread if spread > 0 else 0.0
    return math.exp(level + slope * (rate - middle))


def highest_rate(curve: Curve, q: float, seconds: float, seed: int = 0) -> float:
    """The highest rate on one core whose quantile `q` is at most `seconds`; 0 where none is. Within 1 %.

    Not more than the highest that was measured: how a server behaves so near to its end is no matter for a model.
    """
    low, high = 0.0, curve.residuals[-1].rate if curve.residuals else curve.capacity
    if quantile(curve, 0.001 * high, q, seed) > seconds:
        return 0.0
    if quantile(curve, high, q, seed) <= seconds:
        return high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        if quantile(curve, middle, q, seed) <= seconds:
            low = middle
        else:
            high = middle
    return low


def stalls_of(lone: Counts, seconds: float) -> tuple[float, tuple[float, ...]]:
    """Stalls a second, and a sample of their durations, from the latencies of a closed loop with one call in flight.

    Its calls follow each other without a gap, so whatever stopped the server for a while is part of one of them.
    """
    median = histogram.quantile(lone, 0.5)
    durations = _values(np.where(_LONG * median < histogram.MIDDLES, lone, 0)) - median
    if not len(durations):
        return 0.0, ()
    return len(durations) / seconds, _sample(durations)


def _going(per_second: float, stalls: Sequence[float]) -> float:
    """The share of the time that is no stall."""
    return max(0.0, 1.0 - per_second * (sum(stalls) / len(stalls) if stalls else 0.0))


def varies_of(lone: Counts) -> tuple[float, ...]:
    """A sample of lone latencies that met no stall, over their mean."""
    body = _values(np.where(_LONG * histogram.quantile(lone, 0.5) < histogram.MIDDLES, 0, lone))
    return _sample(body / body.mean())


def _values(counts: Counts) -> NDArray[np.float64]:
    return np.repeat(histogram.MIDDLES, counts)


def _sample(values: NDArray[np.float64]) -> tuple[float, ...]:
    kept = values if len(values) <= _KEPT else np.quantile(values, (np.arange(_KEPT) + 0.5) / _KEPT)
    return tuple(round(float(value), 7) for value in kept)


@dataclass(frozen=True, slots=True)
class Observed:
    """Latencies in seconds at a rate in requests/s in an open loop, for each of LATENCY_QUANTILES."""

    rate: float
    latencies: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.latencies[0]


@dataclass(frozen=True, slots=True)
class Alone:
    """A closed loop with one call in flight: its latencies, over `seconds`."""

    latency: Counts
    seconds: float


@dataclass(frozen=True, slots=True)
class Full:
    """The most that is answered, in requests/s: in a closed loop with `in_flight` calls, and in an open loop that
    offered more than it (`sustained`)."""

    closed: float
    in_flight: int
    sustained: float
    client_limited: bool = False


def fit(model: str, rows: float, max_batch: int, full: Full, lone: Alone, observed: Sequence[Observed]) -> Curve:
    """A curve from what was measured. Raises LoadTestError where no curve comes near it.

    The most that was answered fixes a + b·n; how the median grows with the rate tells a from d: what occupies the core
    makes others wait, what does not only adds. What the simulation then lacks at each rate becomes its residual.
    """
    per_second, stalls = stalls_of(lone.latency, lone.seconds)
    varies = varies_of(lone.latency)
    alone = histogram.quantile(lone.latency, 0.5)
    batch = min(full.in_flight, max_batch)
    # Seconds of a batch of `batch`. More than in a closed loop may be answered where its clients are slow.
    whole = batch * _going(per_second, stalls) / max(full.closed, full.sustained)
    best: tuple[float, Curve] | None = None
    for share in np.geomspace(0.02, 1.5, 24):
        a = float(share * alone)
        b = (whole - a) / batch
        if b <= 0:
            continue
        bare = Curve(model, a, b, 0.0, max_batch, rows, per_second, stalls, varies)
        known = [(o, float(np.median(simulate(bare, o.rate, 0, 5000)))) for o in observed if o.rate < bare.capacity]
        if not known:
            continue
        d = max(0.0, float(np.median([o.median - simulated for o, simulated in known])))
        error = sum(math.log((simulated + d) / o.median) ** 2 for o, simulated in known) / len(known)
        if best is None or error < best[0]:
            best = error, replace(bare, d=d, sustained=full.sustained, client_limited=full.client_limited)
    if best is None:
        raise LoadTestError(
            f"{full.closed:,.0f} requests/s with {full.in_flight} in flight do not fit {alone * 1e6:.0f} µs alone"
        )
    curve = best[1]
    residuals = []
    for seen in observed:
        if seen.rate < curve.capacity:
            counts = _simulated(curve, seen.rate, 0)
            simulated = [histogram.quantile(counts, q) for q in LATENCY_QUANTILES]
            ratios = [measured / known for measured, known in zip(seen.latencies, simulated, strict=True)]
            residuals.append(Residual(seen.rate, tuple(ratios)))
    return replace(curve, residuals=tuple(residuals))
