"""Made-up values for a network's inputs, where no real ones are known: to measure, warm up and probe with. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.model.signature import TensorSpec

ANY_SIZE = 4  # taken where a dimension beyond the batch may be of any size


def example(tensor: TensorSpec, rows: int, rng: np.random.Generator, scale: float = 1.0) -> NDArray[Any]:
    """Random values that a network will most likely take: [rows, ...]; small integers, since they may be indices."""
    shape = (rows, *(ANY_SIZE if s < 0 else s for s in tensor.shape[1:]))
    dtype = tensor.datatype.numpy
    if dtype is None:
        return np.full(shape, "a", dtype=object)
    if tensor.datatype.as_bits:
        return tensor.datatype.narrowed(np.asarray(rng.standard_normal(shape) * scale, np.float32))
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
