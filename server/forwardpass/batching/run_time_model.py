"""The run time of a batch: a + b·rows, fitted to measurements. Pure: times are passed in, no clock is read.

The queue uses it to decide whether a deadline can still be met, and how many rows fit before one. Both depend on how
far the fit can be trusted, so its relative error is tracked as well: `lower_bound` decides rejections (rejecting a
feasible request is a bug), `upper_bound` plans batches.
"""

from __future__ import annotations

import math

FORGETTING = 0.98  # weight of past observations at each new one: about the last fifty batches count
OUTLIER = 4.0  # slower batches are clipped to this many times the fit: one page fault must not cause rejections
MIN_MARGIN = 0.1
MAX_MARGIN = 0.9


class RunTimeModel:
    """Run time in seconds of a batch of B rows, as a + b·B with a, b >= 0, by exponentially weighted least squares.

    - Without observations every prediction is 0 s: nothing is rejected on a guess.
    - The margin is three times the mean relative error, within [0.1, 0.9].
    """

    __slots__ = ("_n", "_x", "_xx", "_xy", "_y", "a", "b", "error", "margin")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.a = 0.0  # seconds per batch, of any size
        self.b = 0.0  # seconds per row
        self.error = 0.0
        self.margin = MIN_MARGIN

    def observe(self, rows: int, seconds: float) -> None:
        """Record that a batch of `rows` rows took `seconds`."""
        if self._n > 0.0:
            predicted = self.a + self.b * rows
            if predicted > 0.0:
                seconds = min(seconds, OUTLIER * predicted)
                self.error += 0.05 * (abs(seconds - predicted) / predicted - self.error)
                self.margin = min(MAX_MARGIN, max(MIN_MARGIN, 3.0 * self.error))
        keep = FORGETTING
        self._n = keep * self._n + 1.0
        self._x = keep * self._x + rows
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + rows * rows
        self._xy = keep * self._xy + rows * seconds
        spread = self._n * self._xx - self._x * self._x
        # With only one recent batch size, keep the slope and fit the constant: the spread is about 0.
        if spread > 1e-3 * self._n * self._xx:
            self.b = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        self.a = (self._y - self.b * self._x) / self._n
        if self.a < 0.0:
            self.a = 0.0
            self.b = self._y / self._x if self._x > 0.0 else 0.0

    def predict(self, rows: int) -> float:
        """Expected seconds for a batch of `rows` rows."""
        return self.a + self.b * rows

    def lower_bound(self, rows: int) -> float:
        """The least seconds that a batch of `rows` rows may take. Used for rejections."""
        return (self.a + self.b * rows) * (1.0 - self.margin)

    def upper_bound(self, rows: int) -> float:
        """The most seconds that a batch of `rows` rows may take. Used to plan batches."""
        return (self.a + self.b * rows) * (1.0 + self.margin)

    def rows_within(self, seconds: float) -> float:
        """The most rows whose `upper_bound` is at most `seconds`; 0 where none fit, inf where any number does."""
        room = seconds / (1.0 + self.margin) - self.a
        if room < 0.0:
            return 0.0
        return math.inf if self.b <= 0.0 else room / self.b
