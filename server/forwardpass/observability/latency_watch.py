"""Whether the latency of the last second exceeded a bound: `p99>20ms`, judged by differences of histograms.

Off the request path: once a second the counts that the metrics keep anyway are compared with those of a second ago.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Self

EXPECTED: Final = "expected pQ>LIMIT, such as p99>20ms or p99.9>500us, with us, ms or s"
_FORM = re.compile(r"p(?P<percent>\d{1,2}(?:\.\d+)?)>(?P<limit>\d+(?:\.\d+)?)(?P<unit>us|ms|s)", re.ASCII)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BETWEEN_SECONDS: Final = 60.0  # between two times that a watch fires

Counts = Mapping[tuple[str, str], Sequence[int]]  # by model and version: requests by latency


class LatencyCondition(NamedTuple):
    """`quantile` of the requests' latencies is above `seconds`."""

    quantile: float
    seconds: float
    text: str

    @classmethod
    def parse(cls, text: str, bounds: Sequence[float]) -> Self:
        """Raises ValueError for anything else than pQ>LIMIT, and for a limit beyond `bounds`, the histogram's."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(EXPECTED)
        quantile, seconds = float(found["percent"]) / 100, float(found["limit"]) * _UNITS[found["unit"]]
        if quantile == 0 or not bounds[0] <= seconds <= bounds[-1]:
            raise ValueError(
                f"{EXPECTED}; Q between 0 and 100, LIMIT between {bounds[0] * 1e6:g}us and {bounds[-1]:g}s"
            )
        return cls(quantile, seconds, text)


class LatencyWatch:
    """Fires when any model's requests of the last interval meet the condition. For one thread."""

    def __init__(
        self,
        condition: LatencyCondition,
        bounds: Sequence[float],
        read: Callable[[], Counts],
        fire: Callable[[str], object],
    ) -> None:
        """`read` returns the counts up to now, by the histogram's `bounds`; `fire` is called with the cause."""
        self._condition = condition
        self._bounds = bounds
        self._read = read
        self._fire = fire
        self._before: Counts = read()
        self._fired = float("-inf")

    def look(self, now: float) -> None:
        """Compare with the last look. `now`: seconds on a monotonic clock. Fires once in BETWEEN_SECONDS at most."""
        before, self._before = self._before, self._read()
        if now - self._fired < BETWEEN_SECONDS:
            return
        for labels, counts in self._before.items():
            fresh = [new - old for new, old in zip(counts, before.get(labels, [0] * len(counts)), strict=True)]
            slow, total = above(self._condition.seconds, self._bounds, fresh), sum(fresh)
            allowed = (1.0 - self._condition.quantile) * total * (1.0 + 1e-9)  # 10 of 100 do not exceed p90
            if total and slow > allowed:
                self._fired = now
                name = " version ".join(labels)
                self._fire(f"{self._condition.text}: {slow:.0f} of {total} requests of model {name} took longer")
                return


def above(seconds: float, bounds: Sequence[float], counts: Iterable[int]) -> float:
    """How many values exceed `seconds`; within the bucket that it divides, they are taken to be spread evenly."""
    total = 0.0
    low = 0.0
    for high, count in zip((*bounds, float("inf")), counts, strict=True):
        if low >= seconds:
            total += count
        elif high > seconds:
            total += count * (high - seconds) / (high - low)
        low = high
    return total
