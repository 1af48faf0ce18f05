"""The batch size beyond which a larger batch gains little: the default of max_batch_size. Pure.

A run of n rows takes about a + b·n seconds: its rows share the fixed cost a, until arithmetic or memory is the limit.
Then throughput stays constant, while latency continues to grow: a larger batch delays its own requests, and those
behind it, for longer. The knee is the smallest batch whose rows cost little more than those of an infinite one; the
longer its run, the more they may: 12 % if a run is short, 24 % if it takes 50 ms.

The result for a network must be the same at every start and in every replica, although measurements vary:

- Candidates are powers of four. From one to the next the surplus of a row falls to a quarter, so few networks lie near
  the limit between two of them.
- A line through all measurements decides, not a single one; and the decision depends mostly on the ratio a / b, in
  which a temporary slowdown of the machine cancels out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RUN_COST = 20e-6  # seconds of a run that the server spends outside the network: taking a batch, stacking, settling
SURPLUS = 0.12  # the extra cost allowed for a row, relative to an infinite batch
PATIENCE = 0.05  # seconds of a run that allow SURPLUS once more
NEAR = 1.4  # a surplus within this factor of the limit is near it
SIZES = (1, 4, 16, 64, 256, 1024)  # candidates; the default is never larger
LONGEST_RUN = 0.5  # seconds; a batch that takes longer, and longer than four rows one by one, is not a candidate

Times = Sequence[tuple[int, float]]  # (rows, seconds of a run of that many rows)


@dataclass(frozen=True, slots=True)
class Line:
    """The seconds of a run, `call` + `row` · rows; neither is negative."""

    call: float
    row: float

    def seconds(self, rows: int) -> float:
        return self.call + self.row * rows

    def surplus(self, rows: int) -> float:
        """The extra cost to the server of a row in such a batch, relative to an infinite batch; 0.1 is 10 %."""
        return (self.call + RUN_COST) / (self.row * rows) if self.row > 0.0 else float("inf")

    def enough(self, rows: int) -> bool:
        """Whether a larger batch would gain too little for its added latency."""
        return self.surplus(rows) <= _allowed(self.seconds(rows))


def line(times: Times) -> Line:
    """The line with the least relative errors, by weighted least squares.

    A single row is left out if two larger sizes are known: it is run by other kernels than a batch.
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

    `times`: at least one, in any order; the sizes need not be SIZES. Raises ValueError if there is none.
    """
    found = _before_a_cliff(sorted(times))
    if not found:
        raise ValueError("no batch was measured")
    fitted = line(found)
    (rows, seconds), *larger = found
    # The smallest size, mostly a single row, is not on the line: its measured time is used.
    if not larger or seconds + RUN_COST <= (1.0 + _allowed(seconds)) * rows * fitted.row:
        return rows
    return next((rows for rows, _ in larger if fitted.enough(rows)), found[-1][0])


def undecided(times: Times) -> bool:
    """Whether a size is so near the limit that more measurements are worthwhile."""
    fitted = line(_before_a_cliff(times))
    ratios = (fitted.surplus(rows) / _allowed(fitted.seconds(rows)) for rows, _ in times[1:])
    return any(1.0 / NEAR < ratio < NEAR for ratio in ratios)


def next_size(times: Times, most: int) -> int | None:
    """Which of SIZES to measure after `times`, the smallest first; None if it would change nothing or take too long.

    `most`: the largest size allowed. A run may take LONGEST_RUN, or four times a single row, by the estimate so far.
    """
    if not times:
        return SIZES[0]
    following = next((size for size in SIZES if size > times[-1][0]), None)
    if following is None or following > most:
        return None
    # A size beyond the knee was measured, and one more than the three needed to judge a line.
    if len(times) > 3 and knee(times) < times[-1][0]:
        return None
    limit = max(LONGEST_RUN, SIZES[1] * times[0][1])
    return following if len(times) < 2 or line(times).seconds(following) <= limit else None


def describe(times: Times) -> str:
    """The curve in words: "a row takes 5.26 ms of 1, 1.45 ms of 4, ...; a run 2.9 ms + 0.5 ms a row"."""
    curve = ", ".join(f"{_short(seconds / rows)} of {rows}" for rows, seconds in times)
    fitted = line(times)
    return f"a row takes {curve}; a run {_short(fitted.call)} + {_short(fitted.row)} a row"


def _allowed(seconds: float) -> float:
    """The surplus allowed for a row in a run of `seconds`."""
    return SURPLUS * (1.0 + seconds / PATIENCE)


def _before_a_cliff(times: Times) -> Times:
    """`times` without the largest sizes whose rows cost over SURPLUS more than the cheapest: they overflow caches."""
    if not times:
        return times
    cheapest = min(seconds / rows for rows, seconds in times)
    last = max(i for i, (rows, seconds) in enumerate(times) if seconds / rows <= (1.0 + SURPLUS) * cheapest)
    return times[: last + 1]


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
