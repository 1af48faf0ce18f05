"""A server core as a queue that serves batches: discrete-event simulation and parameter fit. Pure, seeded.

The model: requests arrive at random; an idle core takes all waiting requests, up to `max_batch`, and is busy for
a·x + b·n seconds with n of them, x drawn from the variation of lone calls; all n responses are sent when it is done,
and reach the client `d` seconds later. Anything else that stops the core (the hypervisor, the scheduler, a garbage
collector) is a stall: stalls begin at random, with the observed durations. Effects not modelled (a kernel and several
threads that share the core, flow control, priorities, rejections, cores that help each other) enter as measured
residuals: the ratio of measured to simulated latency at some loads.
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

REQUESTS: Final = 40_000  # minimum per simulation: 360 of them lie beyond the p99
SECONDS: Final = 10.0  # minimum per simulation: stalls are rare
LATENCY_QUANTILES: Final = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # at which residuals are kept
_LONG: Final = 4.0  # a lone request that takes more than this many medians met a stall
_KEPT: Final = 500  # maximum values in a sample
_NEARBY: Final = 0.06  # width of the residual smoothing kernel, as a fraction of the highest rate


@dataclass(frozen=True, slots=True)
class Residual:
    """Ratio of measured to simulated latency at a rate in requests/s, for each of LATENCY_QUANTILES."""

    rate: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One core (or GPU) with one model. Times in seconds; `rows`: mean rows per request when it was measured."""

    model: str
    a: float  # per batch, however many requests are in it
    b: float  # per request in the batch
    d: float  # from the end of the batch to the client; does not occupy the core
    max_batch: int  # requests
    rows: float
    stalls_per_second: float
    stalls: tuple[float, ...]  # durations, as a sample
    varies: tuple[float, ...] = (1.0,)  # factors of `a`, as a sample
    sustained: float = math.inf  # requests/s answered while more were offered
    residuals: tuple[Residual, ...] = ()  # by rate
    client_limited: bool = False  # `sustained` is the client's limit

    @property
    def capacity(self) -> float:
        """Requests/s above which the queue grows without bound."""
        fitted = _going(self.stalls_per_second, self.stalls) * self.max_batch / (self.a + self.b * self.max_batch)
        return min(self.sustained, fitted)

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        # JSON has no infinity; infinite here means that no more was ever offered than was answered.
        return {**said, "sustained": said["sustained"] if math.isfinite(said["sustained"]) else None}

    @classmethod
    def from_json(cls, said: Any) -> Curve:
        """Raises LoadTestError if the JSON is not a curve."""
        try:
            residuals = tuple(Residual(r["rate"], tuple(r["ratios"])) for r in said["residuals"])
            sustained = math.inf if said["sustained"] is None else said["sustained"]
            samples = {"stalls": tuple(said["stalls"]), "varies": tuple(said["varies"])}
            return cls(**{**said, **samples, "sustained": sustained, "residuals": residuals})
        except (TypeError, KeyError) as error:
            raise LoadTestError(f"not a curve that this version of `forwardpass plan --save` wrote: {error}") from None


def simulate(curve: Curve, rate: float, seed: int = 0, requests: int = REQUESTS) -> NDArray[np.float64]:
    """Latencies in seconds of `requests` requests at `rate` a second on one core, without the first tenth.

    Residuals are not applied.
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
        # A stall that began while the core was idle delays the requests that arrive during it.
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
    """Start times and durations in seconds, with a sentinel at infinity at the end.

    Stratified: one stall in each of equal intervals, with durations spread evenly over the sample. A simulation of a
    few seconds has few stalls, and their number and lengths must match the observed ones rather than vary by chance.
    """
    if not curve.stalls or not curve.stalls_per_second:
        return [math.inf], [0.0]
    # The queue may drain after the last arrival.
    count = math.ceil(curve.stalls_per_second * (seconds * 1.5 + 10))
    begins = (np.arange(count) + generator.uniform(0, 1, count)) / curve.stalls_per_second
    turns = math.ceil(count / len(curve.stalls))
    durations = np.concatenate([generator.permutation(curve.stalls) for _ in range(turns)])[:count]
    return [*begins.tolist(), math.inf], [*durations.tolist(), 0.0]


@functools.lru_cache(maxsize=512)
def _simulated(curve: Curve, rate: float, seed: int) -> Counts:
    return histogram.of(simulate(curve, rate, seed, max(REQUESTS, int(rate * SECONDS))))


def quantile(curve: Curve, rate: float, q: float, seed: int = 0) -> float:
    """Seconds, simulated and corrected by the residuals measured near that rate; inf at or above the capacity."""
    if rate >= curve.capacity:
        return math.inf
    return histogram.quantile(_simulated(curve, rate, seed), q) * _ratio(curve, rate, q)


def _ratio(curve: Curve, rate: float, q: float) -> float:
    """The residual at a rate and a quantile: a weighted linear fit through those measured nearby, which averages out
    noise; a rate outside the measured range is clipped to it."""
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
    """The highest rate on one core whose quantile `q` is at most `seconds`, within 1 %; 0 if there is none.

    At most the highest measured rate: the model does not extrapolate to how a server behaves closer to its limit.
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

    Its calls follow each other without a gap, so every stall of the server is part of one of them.
    """
    median = histogram.quantile(lone, 0.5)
    durations = _values(np.where(_LONG * median < histogram.MIDDLES, lone, 0)) - median
    if not len(durations):
        return 0.0, ()
    return len(durations) / seconds, _sample(durations)


def _going(per_second: float, stalls: Sequence[float]) -> float:
    """The share of the time outside stalls."""
    return max(0.0, 1.0 - per_second * (sum(stalls) / len(stalls) if stalls else 0.0))


def varies_of(lone: Counts) -> tuple[float, ...]:
    """A sample of lone latencies without a stall, divided by their mean."""
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
    """A closed loop with one call in flight: latencies collected over `seconds`."""

    latency: Counts
    seconds: float


@dataclass(frozen=True, slots=True)
class Full:
    """Maximum throughput in requests/s: in a closed loop with `in_flight` calls, and in an overloaded open loop
    (`sustained`)."""

    closed: float
    in_flight: int
    sustained: float
    client_limited: bool = False


def fit(model: str, rows: float, max_batch: int, full: Full, lone: Alone, observed: Sequence[Observed]) -> Curve:
    """Fit a curve to measurements. Raises LoadTestError if no curve fits.

    Maximum throughput fixes a + b·n; the growth of the median with the rate separates a from d: time that occupies the
    core delays other requests, other time only adds latency. The remaining ratio of measured to simulated latency at
    each rate becomes its residual.
    """
    per_second, stalls = stalls_of(lone.latency, lone.seconds)
    varies = varies_of(lone.latency)
    alone = histogram.quantile(lone.latency, 0.5)
    batch = min(full.in_flight, max_batch)
    # Seconds per batch of `batch` requests. The open loop may exceed the closed one, whose clients may be slow.
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
