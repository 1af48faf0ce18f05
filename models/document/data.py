"""Five measurements of 178 Italian wines from three growers, out of the thirteen that scikit-learn ships (UCI Wine).

Rows are raw features in their own units; standardising them is the network's own affair. Needs no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEATURES = ["alcohol", "flavanoids", "color_intensity", "hue", "proline"]
LABELS = ["grower 1", "grower 2", "grower 3"]
_HELD_OUT = 44  # one in four

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def training() -> Split:
    """The rows to learn from: x [134, 5] float32, y [134] int64."""
    x, y = _shuffled()
    return x[_HELD_OUT:], y[_HELD_OUT:]


def held_out() -> Split:
    """The rows that training never sees, the same every time: x [44, 5] float32, y [44] int64."""
    x, y = _shuffled()
    return x[:_HELD_OUT], y[:_HELD_OUT]


def _shuffled() -> Split:
    from sklearn.datasets import load_wine  # a second to import

    wine = load_wine()
    x = wine.data[:, [wine.feature_names.index(feature) for feature in FEATURES]]
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), wine.target[order].astype(np.int64)
