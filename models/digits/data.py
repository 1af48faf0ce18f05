"""Handwritten digits: the 1,797 scans of 8 x 8 pixels that scikit-learn ships (UCI Optical Recognition, test part).

Rows are raw features, 64 pixels of 0 to 16; standardising them is the network's own affair. Needs no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LABELS = [str(digit) for digit in range(10)]
_HELD_OUT = 360  # one in five

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def training() -> Split:
    """The rows to learn from: x [1437, 64] float32, y [1437] int64."""
    x, y = _shuffled()
    return x[_HELD_OUT:], y[_HELD_OUT:]


def held_out() -> Split:
    """The rows that training never sees, the same every time: x [360, 64] float32, y [360] int64."""
    x, y = _shuffled()
    return x[:_HELD_OUT], y[:_HELD_OUT]


def _shuffled() -> Split:
    from sklearn.datasets import load_digits  # a second to import

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order].astype(np.int64)
