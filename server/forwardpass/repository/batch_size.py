"""Chooses the rows of one matrix: as configured, else measured when the network is opened; `knee` decides by the curve.

Nothing is stored between starts: the machine may be another then. Noise from other processes must have no effect: a run
of one thread is timed by the CPU time of that thread, sizes take turns, and the quickest runs of each size count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.execution.placement import Placement
from forwardpass.execution.session import Runnable
from forwardpass.model.example_inputs import example
from forwardpass.model.signature import ModelSignature
from forwardpass.repository.knee import SIZES, describe, knee, next_size, undecided

UNMEASURED = 64  # rows if the network can't be run on made-up values
MOST_BYTES = 16 << 20  # bytes of the inputs of the largest batch tried; one row may exceed it
ROUNDS, ROUNDS_SECONDS = 5, 0.4  # sizes take turns for at least this many rounds, and this many seconds
BUDGET = 1.0  # seconds after which the rounds end; a run in progress is finished
_VISIT, _SHORT = 3, 20e-3  # this many runs of a size per round if one takes less than _SHORT seconds; else one run

Clock = Callable[[], float]


def clock_of(placement: Placement) -> Clock:
    """The clock for runs: CPU time, which other processes hardly affect, if the calling thread does all the work."""
    return time.thread_time if placement.on_calling_thread else time.perf_counter


def choose(
    signature: ModelSignature,
    session: Runnable,
    told: int | None,
    samples: Sequence[NDArray[Any]] | None,
    clock: Clock = time.perf_counter,
) -> tuple[int, str]:
    """The rows of a full matrix, and how they were chosen, in words; '' if they are as `told` or there is no batch.

    `samples`: real rows per input, if known. `clock`: see clock_of. A network without a batch is not measured.
    """
    if told is not None:
        return told, ""
    if not signature.batchable:
        return UNMEASURED, ""
    rng = np.random.default_rng(0)
    one = [example(t, 1, rng) if samples is None else samples[i][:1] for i, t in enumerate(signature.inputs)]
    made: dict[int, list[NDArray[Any]]] = {}

    def run(rows: int) -> None:
        if rows not in made:
            made[rows] = [np.repeat(array, rows, axis=0) for array in one]
        session.run(made[rows], signature.default_outputs)

    most = min(SIZES[-1], max(1, MOST_BYTES // max(1, sum(array.nbytes for array in one))))
    try:
        times = measure(run, clock, time.perf_counter, most)
    except RequestError as error:
        return UNMEASURED, f"max_batch_size {UNMEASURED}: it could not be measured: {error}"
    rows = knee(times)
    return rows, f"max_batch_size {rows} measured, the least power of four that is enough: {describe(times)}"


def measure(run: Callable[[int], object], clock: Clock, now: Clock, most: int = SIZES[-1]) -> list[tuple[int, float]]:
    """(rows, seconds by `clock`) of batches of 1, 4, 16 ... rows, each the lower decile of its runs.

    Other processes can only lengthen a run; but CPU time is sometimes undercounted, so the minimum of many runs would
    be too low. `run` makes one run of the given rows; its exceptions are passed on. `now`: the clock for time limits.
    Sizes up to `most` rows are tried as long as `next_size` returns one; then all of them take turns.
    """

    def timed(rows: int) -> float:
        start = clock()
        run(rows)
        return clock() - start

    taken: dict[int, list[float]] = {}
    end = math.inf
    rows = next_size([], most)
    while rows is not None:
        while rows is not None:
            run(rows)  # the first run of a size allocates
            taken[rows] = [timed(rows)]
            if taken[rows][0] < _SHORT:
                taken[rows] += [timed(rows) for _ in range(_VISIT)]
            rows = next_size(_quickest(taken), most)
        end = min(end, now() + BUDGET)
        _take_turns(timed, taken, now, end)
        rows = next_size(_quickest(taken), most)  # noise may have ended the search too soon
    return _quickest(taken)


def _take_turns(timed: Callable[[int], float], taken: dict[int, list[float]], now: Clock, end: float) -> None:
    """Run all sizes in rounds, more of them if the choice is close, until `end` at the latest."""
    since, rounds = now(), 0
    while rounds < ROUNDS or now() - since < ROUNDS_SECONDS or undecided(_quickest(taken)):
        rounds += 1
        for rows, seconds in taken.items():
            for _ in range(_VISIT if seconds[0] < _SHORT else 1):
                if now() >= end:
                    return
                seconds.append(timed(rows))


def _quickest(taken: dict[int, list[float]]) -> list[tuple[int, float]]:
    return [(rows, sorted(seconds)[len(seconds) // 10]) for rows, seconds in taken.items()]
