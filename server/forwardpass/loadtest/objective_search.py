"""Search for the highest rate that meets a latency objective, with a confidence interval. No I/O of its own.

A failed request counts as infinitely late, so an objective cannot be met by rejecting requests. A probe that misses the
objective while the client was saturated is repeated; if that persists, the result is marked as a lower bound.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forwardpass.errors import LoadTestError
from forwardpass.loadtest.measurement import Measurement

Measure = Callable[[float, float], Measurement]  # requests/s, seconds

START = 250.0  # requests/s, where the search begins
LEAST = 1.0  # requests/s, where the search gives up
STEPS = 5  # halvings of the bracket in each repeat: 2 % apart at the end
AGAIN = 2  # repeats of a probe spoiled by the client
_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}

# Two-sided 95 % points of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True, slots=True)
class Objective:
    """A share `q` of all requests must be answered within `seconds`."""

    q: float
    seconds: float

    def is_met(self, measured: Measurement) -> bool:
        return measured.quantile(self.q, of_all=True) <= self.seconds

    def __str__(self) -> str:
        value = f"{self.seconds * 1e3:g} ms" if self.seconds < 1 else f"{self.seconds:g} s"
        return f"p{100 * self.q:g} ≤ {value}"


def parse(text: str) -> Objective:
    """ "p99=10ms", "p99.9=500us". Raises ValueError with the expected form."""
    found = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)\s*[=<]=?\s*(\d+(?:\.\d+)?)\s*(us|µs|ms|s)", text.strip())
    if found is None or not float(found[2]):
        raise ValueError(f"expected an objective like p99=10ms, got {text!r}")
    return Objective(round(float(found[1]) / 100, 9), float(found[2]) * _UNITS[found[3]])


@dataclass(frozen=True, slots=True)
class Knee:
    """The rate above which the objective is no longer met. Rates in requests/s.

    `estimates`: one per repeat; `rate`: their geometric mean; [`low`, `high`]: its 95 % confidence interval.
    `confirmed`: a longer measurement that met the objective, at `low` (at least half of `rate`) or, if that failed,
    below it.
    `client_limited`: the client saturated before the server; the rates are lower bounds.
    """

    objective: Objective
    estimates: Sequence[float]
    rate: float
    low: float
    high: float
    confirmed: Measurement
    points: Sequence[Measurement]
    client_limited: bool


def search(measure: Measure, objective: Objective, seconds: float, repeats: int, start: float = START) -> Knee:
    """Double (or halve) the rate until the objective is crossed, bisect that bracket `repeats` times, then confirm.

    `seconds`: duration of one probe. Raises LoadTestError if no rate meets the objective.
    """
    points: list[Measurement] = []
    limited = False

    def met(rate: float, length: float) -> bool:
        nonlocal limited
        for _ in range(AGAIN + 1):
            points.append(measure(rate, length))
            if objective.is_met(points[-1]):
                return True
            if not points[-1].saturation:
                return False
        limited = True
        return False

    rate = start
    if met(rate, seconds):
        while met(2 * rate, seconds):
            rate *= 2
    else:
        while not met(rate / 2, seconds):
            rate /= 2
            if rate < LEAST:
                raise LoadTestError(
                    f"{objective} is not met even at {rate:.2g} requests/s: {_why(points[-1], objective)}"
                )
        rate /= 2
    low, high = rate, 2 * rate
    estimates = []
    for _ in range(repeats):
        below, above = low, high
        for _ in range(STEPS):
            middle = math.sqrt(below * above)
            if met(middle, seconds):
                below = middle
            else:
                above = middle
        estimates.append(below)
    centre, least, most = interval(estimates)
    # The lower end met the objective only in short probes; a reported rate must hold for longer.
    rate = max(least, 0.5 * centre)
    while not met(rate, 2 * seconds):
        rate *= 0.95
        if rate < LEAST:
            raise LoadTestError(f"{objective} was met for {seconds:g} s at a time, but never for {2 * seconds:g} s")
    return Knee(objective, estimates, centre, least, most, points[-1], points, limited)


def interval(estimates: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean and its 95 % confidence interval, by Student's t; a single estimate is all three."""
    logs = [math.log(estimate) for estimate in estimates]
    centre = statistics.fmean(logs)
    if len(logs) < 2:
        return estimates[0], estimates[0], estimates[0]
    half = _T.get(len(logs) - 1, 2.0) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)


def _why(measured: Measurement, objective: Objective) -> str:
    if measured.recording.failed:
        return f"{measured.errors:.1%} of the requests failed ({measured.recording.by_outcome()})"
    return f"p{100 * objective.q:g} was {measured.quantile(objective.q) * 1e3:.3g} ms"
