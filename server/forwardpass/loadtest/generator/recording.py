"""The measurements of one or several clients as one flat array of counts, for shared memory; merged by addition.

Requests are counted in time slices by when they were due. Latencies are those of OK responses, from when the request
was due; all requests are counted by outcome.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import Status
from forwardpass.loadtest.generator.histogram import BUCKETS, Counts, places

UNANSWERED: Final = 17  # no response came before the client gave up waiting
WRONG: Final = 18  # a response that differs from the earlier one to the same request
OUTCOMES: Final = 19
OUTCOME_NAMES: Final = (*(status.name for status in sorted(Status)), "UNANSWERED", "WRONG_ANSWER")


class Recording:
    """Counts over `slices` time slices. `memory`: int64 array of length `size(slices)` that holds them."""

    def __init__(self, slices: int, memory: NDArray[np.int64] | None = None) -> None:
        self.slices = slices
        self.flat: NDArray[np.int64] = np.zeros(self.size(slices), np.int64) if memory is None else memory
        cut = np.cumsum([slices * BUCKETS, slices * OUTCOMES, BUCKETS])
        latency, outcomes, lag = np.split(self.flat, cut)[:3]
        self.latency = latency.reshape(slices, BUCKETS)
        self.outcomes = outcomes.reshape(slices, OUTCOMES)  # requests per slice and outcome
        self.lag = lag  # histogram of the client's own delay in sending requests

    @staticmethod
    def size(slices: int) -> int:
        return slices * BUCKETS + slices * OUTCOMES + BUCKETS

    def add_latencies(self, slices: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """OK responses: the slice in which each was due, and its latency. Those outside the slices are ignored."""
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
        """Requests by outcome, without outcomes that did not occur."""
        return {
            name: count for name, count in zip(OUTCOME_NAMES, self.outcomes.sum(axis=0).tolist(), strict=True) if count
        }
