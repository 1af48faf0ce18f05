"""Is batching safe? Whether a row's answer is the same alone and among others, found out by running the network.

Two different things can go wrong in a batch. The answer may depend on the neighbours' values (dynamic quantisation,
batch statistics, attention over the wrong axis): such a model must not be batched. Or the run of another size rounds
differently in the last bits: harmless, but said. So rows are compared alone, among different neighbours and in
batches of different sizes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.serving.interface import Interface, Tensor

ROWS = 8  # rows that are compared; each is run alone and in every batch
# What rounding in another order explains: relative to the largest answer of the row, for 32-bit floats.
ROUNDING = {"f4": 1e-5, "f8": 1e-12, "f2": 5e-3}
ANY_SIZE = 4  # taken where a dimension beyond the batch may be of any size

Run = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]


class Invariance(enum.Enum):
    """`value` is the label in metrics and metadata."""

    EXACT = "exact"  # the same bits
    ROUNDING = "rounding"  # the same but for rounding; independent of the neighbours
    DEPENDENT = "dependent"  # neighbours change the answer, or it could not be run: served one request at a time
    ASSERTED = "asserted"  # the model's options say so; not probed
    NONE = "none"  # axis 0 is not a batch

    @property
    def batches(self) -> bool:
        return self in (Invariance.EXACT, Invariance.ROUNDING, Invariance.ASSERTED)


def probe(
    interface: Interface, run: Run, largest: int, samples: Sequence[NDArray[Any]] | None, half: bool = False
) -> tuple[Invariance, str]:
    """Find out, and say why. `largest`: rows of the largest batch to try; `samples`: real rows per input, if known.

    `half`: the network computes in half precision, whatever type its outputs have: that is how they may be rounded.
    """
    if not interface.batchable:
        return Invariance.NONE, "axis 0 is not a batch of any size"
    rng = np.random.default_rng(20_240_229)
    rows = [_rows(t, ROWS, rng, samples[i] if samples else None) for i, t in enumerate(interface.inputs)]
    try:
        alone = [run([r[i : i + 1] for r in rows]) for i in range(ROWS)]
        exact = True
        # The same size with other neighbours tells dependence from rounding, so each size is run twice.
        for size in sorted({ROWS, min(largest, 2 * ROWS + 1), largest}):
            if size < ROWS:
                continue
            seen: Sequence[NDArray[Any]] | None = None
            for scale in (1.0, 100.0):
                others = [_rows(t, size - ROWS, rng, None, scale) for t in interface.inputs]
                batch = [np.concatenate([r, o]) for r, o in zip(rows, others, strict=True)]
                outputs = run(batch)
                for output, tensor in zip(outputs, interface.outputs, strict=True):
                    if not output.ndim or len(output) != size:
                        why = f"output '{tensor.name}' has shape {list(output.shape)} for {size} rows"
                        return Invariance.NONE, f"{why}: axis 0 is not the batch"
                outputs = [o[:ROWS] for o in outputs]
                for i in range(ROWS):
                    verdict, why = _compare([o[i] for o in outputs], [o[0] for o in alone[i]], interface, size, half)
                    if verdict is Invariance.DEPENDENT:
                        return verdict, why
                    exact = exact and verdict is Invariance.EXACT
                if seen is not None and not all(_equal(a, b) for a, b in zip(seen, outputs, strict=True)):
                    return Invariance.DEPENDENT, f"in a batch of {size}, other neighbours change a row's answer"
                seen = outputs
    except RequestError as error:
        return Invariance.DEPENDENT, f"the probe could not be run: {error}"
    if exact:
        return Invariance.EXACT, f"{ROWS} rows alone and in batches of up to {largest}: the same bits"
    return Invariance.ROUNDING, f"{ROWS} rows alone and in batches of up to {largest}: equal but for rounding"


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()


def _compare(
    got: Sequence[NDArray[Any]], alone: Sequence[NDArray[Any]], interface: Interface, size: int, half: bool
) -> tuple[Invariance, str]:
    """One row's answers in a batch of `size` against those alone."""
    verdict = Invariance.EXACT
    for g, a, tensor in zip(got, alone, interface.outputs, strict=True):
        if _equal(np.asarray(g), np.asarray(a)):
            continue
        kind = np.asarray(a).dtype.str[1:]
        allowed = ROUNDING["f2"] if half and kind in ROUNDING else ROUNDING.get(kind)
        if allowed is None or np.shape(g) != np.shape(a):
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs in a batch of {size}"
        wide, reference = np.asarray(g, np.float64), np.asarray(a, np.float64)
        same = (wide == reference) | (np.isnan(wide) & np.isnan(reference))
        with np.errstate(invalid="ignore"):  # inf - inf, where both are the same
            far = float(np.max(np.abs(wide - reference), where=~same, initial=0.0))
        scale = float(np.max(np.abs(reference), where=np.isfinite(reference), initial=1e-30))
        if not far <= allowed * scale:  # NaN, where only one of the two is, is further than anything
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs by {far:.3g} in a batch of {size}"
        verdict = Invariance.ROUNDING
    return verdict, ""


def example(tensor: Tensor, rows: int, rng: np.random.Generator, scale: float = 1.0) -> NDArray[Any]:
    """Random values that a network will most likely take: [rows, ...]; small integers, since they may be indices."""
    shape = (rows, *(ANY_SIZE if s < 0 else s for s in tensor.shape[1:]))
    dtype = tensor.datatype.numpy
    if dtype is None:
        return np.full(shape, "a", dtype=object)
    if tensor.datatype.name == "BF16":
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def _rows(
    tensor: Tensor, count: int, rng: np.random.Generator, sample: NDArray[Any] | None, scale: float = 1.0
) -> NDArray[Any]:
    if sample is None or not len(sample):
        return example(tensor, count, rng, scale)
    return np.resize(sample, (count, *sample.shape[1:]))
