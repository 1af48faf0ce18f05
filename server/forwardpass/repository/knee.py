"""The batch size beyond which a larger batch gains little: what max_batch_size is where nobody set it. Pure.

A run of n rows takes about a + b·n seconds: what it costs whatever its rows is shared, until arithmetic or memory is
the limit. Throughput then stays as it is, while latency goes on growing: a larger batch keeps those in it, and behind
it, for longer. The knee is the smallest batch whose rows cost little more than those of an endless one; the longer
its run, the more they may: 12 % where a run is short, 24 % where it takes 50 ms.

The same network must come out the same at every start and in every replica, though measurements never do:

- Candidates are powers of four. From one to the next the surplus of a row falls to a quarter, so that few networks lie
  near the limit between two of them.
- A line through all measurements decides, not one of them; and what decides is mostly the ratio a / b, in which a
  slower moment of the machine cancels out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RUN_COST = 20e-6  # seconds that the server spends on a run beside the network: taking a batch, stacking, settling
SURPLUS = 0.12  # by how much a row may cost more than in an endless batch; and as much again
PATIENCE = 0.05  # for every so many seconds that a run takes
NEAR = 1.4  # a surplus is near the limit within this factor
SIZES = (1, 4, 16, 64, 256, 1024)  # candidates; no larger batch is taken by default, whatever it gains
LONGEST_RUN = 0.5  # seconds; a batch that takes longer, and longer than four rows one by one, is not a candidate

Times = Sequence[tuple[int, float]]  # (rows, seconds of a run of as many rows)


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a run as `call` + `row` · rows; neither is negative."""

    call: float
    row: float

    def seconds(self, rows: int) -> float:
        return self.call + self.row * rows

    def surplus(self, rows: int) -> float:
        """By how much a row of such a batch costs the server more than one of an endless batch; 0.1 is 10 %."""
        return (self.call + RUN_COST) / (self.row * rows) if self.row > 0.0 else float("inf")

    def enough(self, rows: int) -> bool:
        """Whether a larger batch would gain too little for the latency that it adds."""
        return self.surplus(rows) <= _allowed(self.seconds(rows))


def line(times: Times) -> Line:
    """The line with the least relative errors, by weighted least squares.

    A lone row is left out where two larger sizes are known: it runs through other kernels than any batch.
    """
    several = [(rows, seconds) for rows, seconds in times if rows > 1]
    known = several if len(several) > 1 else list(times)
    # Dividing each equation call + row * n = t by its t makes the errors relative.
    weights = [1.0 / max(seconds, 1e-9) for _, seconds in known]
    uu = sum(w * w for w in weights)
    uv = sum(w * w * rows for w, (rows, _) in zip(weights, known, strict=True))
    vv = sum(w * w * rows * rows for w, (rows, _) in zip(weights, known, strict=True))
    u, v = sum(weights), sum(w * rows for w, (rows, _) in zip(weights, known, strict=True))
    spread = uu * vv - uv * uv
    if spread > 1e-9 * uu * vv:
        call, row = (u * vv - v * uv) / spread, (v * uu - u * uv) / spread
        if row < 0.0:
            return Line(u / uu, 0.0)
        if call >= 0.0:
            return Line(call, row)
    return Line(0.0, v / vv)


def knee(times: Iterable[tuple[int, float]]) -> int:
    """The smallest of the sizes that is `enough`; else the largest.

    `times`: at least one, in any order; the sizes need not be SIZES. Raises ValueError without any.
    """
    found = _before_a_cliff(sorted(times))
    if not found:
        raise ValueError("no batch was measured")
    fitted = line(found)
    (rows, seconds), *larger = found
    # The smallest size, mostly a lone row, is no part of the line: it counts as it was measured.
    if not larger or seconds + RUN_COST <= (1.0 + _allowed(seconds)) * rows * fitted.row:
        return rows
    return next((rows for rows, _ in larger if fitted.enough(rows)), found[-1][0])


def undecided(times: Times) -> bool:
    """Whether a size lies so near the limit that it pays to measure for longer."""
    fitted = line(_before_a_cliff(times))
    ratios = (fitted.surplus(rows) / _allowed(fitted.seconds(rows)) for rows, _ in times[1:])
    return any(1.0 / NEAR < ratio < NEAR for ratio in ratios)


def next_size(times: Times, most: int) -> int | None:
    """Which of SIZES to measure after `times`, the smallest first; None where that would change nothing, or take long.

    `most`: rows that there may be. A run takes LONGEST_RUN at most, or four times a lone row, by what is known so far.
    """
    if not times:
        return SIZES[0]
    following = next((size for size in SIZES if size > times[-1][0]), None)
    if following is None or following > most:
        return None
    # A size beyond the knee was measured, and one more than the three that a line is judged by.
    if len(times) > 3 and knee(times) < times[-1][0]:
        return None
    limit = max(LONGEST_RUN, SIZES[1] * times[0][1])
    return following if len(times) < 2 or line(times).seconds(following) <= limit else None


def describe(times: Times) -> str:
    """The curve in words: "seconds a row: 5.26 ms alone, 1.45 ms of 4, ...; a run takes 2.9 ms + 0.5 ms a row"."""
    curve = ", ".join(f"{_short(seconds / rows)} of {rows}" for rows, seconds in times)
    fitted = line(times)
    return f"a row takes {curve}; a run {_short(fitted.call)} + {_short(fitted.row)} a row"


def _allowed(seconds: float) -> float:
    """The surplus of a row in a run of so many seconds."""
    return SURPLUS * (1.0 + seconds / PATIENCE)


def _before_a_cliff(times: Times) -> Times:
    """`times` without the largest sizes whose rows cost more than SURPLUS above the cheapest: there caches overflow."""
    if not times:
        return times
    cheapest = min(seconds / rows for rows, seconds in times)
    last = max(i for i, (rows, seconds) in enumerate(times) if seconds / rows <= (1.0 + SURPLUS) * cheapest)
    return times[: last + 1]


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
