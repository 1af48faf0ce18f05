"""Made-up values for a network's inputs, where no real ones are known: to measure, warm up and probe with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.model.signature import ModelSignature, TensorSpec

ANY_SIZE = 4  # taken where a dimension beyond the batch may be of any size
SIZES = (ANY_SIZE, 16, 32, 64, 128, 224)  # tried in turn, for networks that need more of it, as images do
# Texts of one word and of several, of none, and that are numbers: what splits or looks up must meet all kinds.
TEXTS = ("a", "b c", "", "7", "word", "8 9 10", "0.5", "a")


def example(tensor: TensorSpec, rows: int, rng: np.random.Generator, scale: float = 1.0) -> NDArray[Any]:
    """Random values that a network will most likely take: [rows, ...]; small integers, since they may be indices.

    Text is "a" throughout where `scale` is 1, and of all kinds else.
    """
    shape = (rows, *(ANY_SIZE if s < 0 else s for s in tensor.shape[1:]))
    dtype = tensor.datatype.numpy
    if dtype is None:
        chosen = rng.integers(0, len(TEXTS), shape) if scale != 1.0 else np.zeros(shape, np.int64)
        return np.array(TEXTS, dtype=object)[chosen]
    if tensor.datatype.as_bits:
        return tensor.datatype.narrowed(np.asarray(rng.standard_normal(shape) * scale, np.float32))
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def with_sizes(signature: ModelSignature, run: Callable[[Sequence[NDArray[Any]]], object]) -> ModelSignature:
    """The signature with a size, with which `run` works, for the axes of its inputs beyond the batch that may have any.

    As it is where there is no such axis, or no size works.
    """
    if not signature.batchable or all(size >= 0 for t in signature.inputs for size in t.shape[1:]):
        return signature
    for size in SIZES:
        inputs = tuple(replace(t, shape=(-1, *(size if s < 0 else s for s in t.shape[1:]))) for t in signature.inputs)
        rng = np.random.default_rng(0)
        try:
            run([example(tensor, 1, rng) for tensor in inputs])
        except RequestError:
            continue
        return replace(signature, inputs=inputs)
    return signature
