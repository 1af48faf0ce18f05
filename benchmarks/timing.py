"""Times something short by running it many times: seconds a run, from several windows. The clock is passed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """How long: `count` windows of at least `seconds` each, after as long a warm-up."""

    seconds: float = 0.1
    count: int = 7


def per_run(run: Callable[[], object], windows: Windows, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds a run in each window. `run` returns when its work is done.

    The warm-up finds how many runs fill a window, so that the clock is read twice a window and not at every run.
    """
    runs = 0
    began = clock()
    while (spent := clock() - began) < windows.seconds or runs == 0:
        run()
        runs += 1
    # The first runs are slower; more in a window than it needs does no harm.
    many = max(1, round(runs * windows.seconds / spent)) if spent > 0 else runs
    found = []
    for _ in range(windows.count):
        began = clock()
        for _ in range(many):
            run()
        found.append((clock() - began) / many)
    return found
