"""The batch size beyond which a larger batch gains little: what max_batch_size is where nobody set it. Pure.

Throughput grows with the batch, because what a run costs whatever its rows is shared, until the arithmetic or the
memory is the limit; latency goes on growing. The knee is the smallest batch that has most of the throughput.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

RUN_COST = 20e-6  # seconds that the server spends on a run beside the network: taking a batch, stacking, settling
ENOUGH = 0.9  # part of the best throughput that the knee must have
MOST_ROWS = 1024  # no larger batch is taken by default, whatever it gains
LONGEST_RUN = 0.02  # seconds; a batch that takes longer is not tried: a request would wait for it
BUDGET = 0.25  # seconds that measuring may take; a run that has begun is finished
_RUNS = 5  # of each size, and
_MOMENT = 0.004  # seconds of them: whatever else the machine does must let one of them pass
_NO_GAIN = 2  # doublings without a gain after which no larger batch is tried


def knee(times: Iterable[tuple[int, float]]) -> int:
    """The smallest of the batch sizes with at least ENOUGH of the most rows a second among them, in the server.

    `times`: (rows, seconds of a run of as many rows), at least one, in any order. Raises ValueError without any.
    """
    found = sorted((rows, throughput(rows, seconds)) for rows, seconds in times)
    if not found:
        raise ValueError("no batch was measured")
    best = max(speed for _, speed in found)
    return next(rows for rows, speed in found if speed >= ENOUGH * best)


def throughput(rows: int, seconds: float) -> float:
    """Rows a second in the server, in runs of as many rows that take the network `seconds`."""
    return rows / (seconds + RUN_COST)


def measure(run: Callable[[int], object], clock: Callable[[], float], most: int = MOST_ROWS) -> list[tuple[int, float]]:
    """(rows, seconds) of batches of 1, 2, 4 ... rows, the fastest of a few runs each: noise only ever adds.

    `run` makes one run of as many rows; what it raises is passed on. Ends at `most` rows, when BUDGET is spent, at a
    batch that takes longer than LONGEST_RUN, or where doubling gains no more. At least one batch is measured.
    """
    began = clock()
    found: list[tuple[int, float]] = []
    best = 0.0
    idle = 0
    rows = 1
    while rows <= most and idle < _NO_GAIN:
        fastest = float("inf")
        run(rows)  # the first run of a size allocates
        count, since = 0, clock()
        while count < _RUNS or clock() - since < _MOMENT:
            start = clock()
            run(rows)
            fastest = min(fastest, clock() - start)
            count += 1
            if fastest > LONGEST_RUN or clock() - began > BUDGET:
                break
        if found and fastest > LONGEST_RUN:
            break
        found.append((rows, fastest))
        speed = throughput(rows, fastest)
        idle = 0 if speed * ENOUGH > best else idle + 1
        best = max(best, speed)
        if clock() - began > BUDGET:
            break
        rows *= 2
    return found
