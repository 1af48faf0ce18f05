"""What one or several clients measured, as one flat array of counts: fit for shared memory, merged by addition.

Counted by when a request was due, in slices of time. Latencies are those of answers with status OK, from the time they
were due; everything else is counted by what became of it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import Status
from forwardpass.loadtest.generator.histogram import BUCKETS, Counts, places

UNANSWERED: Final = 17  # no answer came before the client gave up waiting
WRONG: Final = 18  # an answer, but not the one that the same request got before
OUTCOMES: Final = 19
OUTCOME_NAMES: Final = (*(status.name for status in sorted(Status)), "UNANSWERED", "WRONG_ANSWER")


class Recording:
    """Counts over `slices` slices of time. `memory`: where to keep them; int64, `size(slices)` long."""

    def __init__(self, slices: int, memory: NDArray[np.int64] | None = None) -> None:
        self.slices = slices
        self.flat: NDArray[np.int64] = np.zeros(self.size(slices), np.int64) if memory is None else memory
        cut = np.cumsum([slices * BUCKETS, slices * OUTCOMES, BUCKETS])
        latency, outcomes, lag = np.split(self.flat, cut)[:3]
        self.latency = latency.reshape(slices, BUCKETS)
        self.outcomes = outcomes.reshape(slices, OUTCOMES)  # how many requests of a slice ended how
        self.lag = lag  # how late requests were sent, by the client's own fault

    @staticmethod
    def size(slices: int) -> int:
        return slices * BUCKETS + slices * OUTCOMES + BUCKETS

    def add_latencies(self, slices: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """OK answers: the slice in which each was due, and how long it took. Those outside are left out."""
        inside = (slices >= 0) & (slices < self.slices)
        chosen = slices[inside]
        np.add.at(self.latency, (chosen, places(seconds[inside])), 1)
        self.outcomes[:, Status.OK] += np.bincount(chosen, minlength=self.slices)

    def add_outcome(self, slice_: int, outcome: int, count: int = 1) -> None:
        if 0 <= slice_ < self.slices:
            self.outcomes[slice_, outcome] += count

    def add_lags(self, slices: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        inside = (slices >= 0) & (slices < self.slices)
        np.add.at(self.lag, places(seconds[inside]), 1)

    @property
    def total_latency(self) -> Counts:
        found: Counts = self.latency.sum(axis=0)
        return found

    @property
    def ok(self) -> int:
        return int(self.outcomes[:, Status.OK].sum())

    @property
    def failed(self) -> int:
        return int(self.outcomes.sum()) - self.ok

    def by_outcome(self) -> dict[str, int]:
        """Requests by what became of them; what did not happen is left out."""
        return {
            name: count for name, count in zip(OUTCOME_NAMES, self.outcomes.sum(axis=0).tolist(), strict=True) if count
        }
