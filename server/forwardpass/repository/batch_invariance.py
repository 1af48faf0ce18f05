"""Is batching safe? Whether a row's answer is the same alone and among others, found out by running the network.

Two different things can go wrong in a batch. The answer may depend on the neighbours' values, or on the row's place
among them (dynamic quantisation, batch statistics, attention over the wrong axis, experts with a capacity): such a
model must not be batched. Or the run of another size rounds differently in the last bits: harmless, but said. So rows
are compared alone, among different neighbours, in shuffled places of batches of different sizes, the largest of which
is the one that will be served. What was not seen to differ may still differ: a contract that says so has the last word.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.model.example_inputs import example
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol import DATATYPES

HALF_ROUNDING = DATATYPES["FP16"].rounding or 0.0
ROWS = 8  # rows that are compared at once; each is run alone and in every batch
SEEDS = 3  # of rows, neighbours and places; the first is tried in batches of every size, the others in the largest

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
    signature: ModelSignature, run: Run, largest: int, samples: Sequence[NDArray[Any]] | None, half: bool = False
) -> tuple[Invariance, str]:
    """Find out, and say why. `largest`: rows of the largest batch that will be served; `samples`: real rows per input,
    if known. Values that are made up need not be ones that the network takes where there are real ones.

    `half`: the network computes in half precision, whatever type its outputs have: that is how they may be rounded.
    """
    if not signature.batchable:
        return Invariance.NONE, "axis 0 is not a batch of any size"
    if samples is not None:  # what is made up is as wide as they are
        shaped = [
            dataclasses.replace(t, shape=(-1, *s.shape[1:])) for t, s in zip(signature.inputs, samples, strict=True)
        ]
        signature = dataclasses.replace(signature, inputs=tuple(shaped))
    sizes = sorted({ROWS, *(size for size in (2 * ROWS + 1, largest) if 1 < size <= largest)})
    exact = True
    compared = 0
    for seed in range(SEEDS):
        # Real rows may all be alike in what matters, so that made-up ones are compared as well.
        real = samples if seed == 0 else None
        try:
            trial = _Trial(signature, run, half, samples, real, np.random.default_rng((20_240_229, seed)))
            for size in sizes if seed == 0 else sizes[-1:]:
                verdict, why = trial.compare(size, thorough=seed == 0)
                if not verdict.batches:
                    return verdict, why
                exact = exact and verdict is Invariance.EXACT
        except RequestError as error:
            if samples is None or seed == 0:
                return Invariance.DEPENDENT, f"the probe could not be run: {error}"
        else:
            compared += ROWS
    where = f"{compared} rows alone and in batches of up to {sizes[-1]}"
    if exact:
        return Invariance.EXACT, f"{where}: the same bits"
    return Invariance.ROUNDING, f"{where}: equal but for rounding"


class _Trial:
    """ROWS rows, and their answers alone."""

    def __init__(
        self,
        signature: ModelSignature,
        run: Run,
        half: bool,
        samples: Sequence[NDArray[Any]] | None,
        real: Sequence[NDArray[Any]] | None,
        rng: np.random.Generator,
    ) -> None:
        """Run each row alone. `real`: rows to compare; None makes them up. Raises RequestError."""
        self._interface, self._run, self._half, self._samples, self._rng = signature, run, half, samples, rng
        self._rows = [_rows(t, ROWS, rng, real[i] if real else None) for i, t in enumerate(signature.inputs)]
        self._alone = [run([r[i : i + 1] for r in self._rows]) for i in range(ROWS)]

    def compare(self, size: int, thorough: bool) -> tuple[Invariance, str]:
        """The rows in batches of `size`, at places drawn once, among neighbours of several kinds. Raises RequestError.

        The same places with other neighbours tell dependence from rounding: not even rounding may differ then.
        """
        places = self._rng.permutation(size)[:ROWS]
        exact = True
        seen: Sequence[NDArray[Any]] | None = None
        for optional, neighbours in self._neighbours(size, thorough):
            for rows, batch in zip(self._rows, neighbours, strict=True):
                batch[places] = rows[: len(places)]
            try:
                outputs = self._run(neighbours)
            except RequestError:
                if optional:
                    continue
                raise
            for output, tensor in zip(outputs, self._interface.outputs, strict=True):
                if not output.ndim or len(output) != size:
                    why = f"output '{tensor.name}' has shape {list(output.shape)} for {size} rows"
                    return Invariance.NONE, f"{why}: axis 0 is not the batch"
            outputs = [o[places] for o in outputs]
            for i in range(len(places)):
                got, alone = [o[i] for o in outputs], [o[0] for o in self._alone[i]]
                verdict, why = _compare(got, alone, self._interface, size, self._half)
                if verdict is Invariance.DEPENDENT:
                    return verdict, why
                exact = exact and verdict is Invariance.EXACT
            if seen is not None and not all(_equal(a, b) for a, b in zip(seen, outputs, strict=True)):
                return Invariance.DEPENDENT, f"in a batch of {size}, other neighbours change a row's answer"
            seen = outputs
        return Invariance.EXACT if exact else Invariance.ROUNDING, ""

    def _neighbours(self, size: int, thorough: bool) -> Iterator[tuple[bool, list[NDArray[Any]]]]:
        """Whole batches, in which the rows then take their places; and whether the network may refuse the values."""
        inputs, rng = self._interface.inputs, self._rng
        for scale in (1.0, 100.0) if thorough else (1.0,):
            yield self._samples is not None, [example(t, size, rng, scale) for t in inputs]
        # All alike, so that they crowd together wherever rows are counted: at one expert, in one bucket.
        yield False, [np.repeat(r[:1], size, axis=0) for r in self._rows]
        if self._samples is not None:
            chosen = rng.integers(0, len(self._samples[0]), size)
            yield False, [np.array(s[chosen]) for s in self._samples]


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()


def _compare(
    got: Sequence[NDArray[Any]], alone: Sequence[NDArray[Any]], signature: ModelSignature, size: int, half: bool
) -> tuple[Invariance, str]:
    """One row's answers in a batch of `size` against those alone."""
    verdict = Invariance.EXACT
    for g, a, tensor in zip(got, alone, signature.outputs, strict=True):
        if _equal(np.asarray(g), np.asarray(a)):
            continue
        datatype = tensor.datatype
        allowed = datatype.rounding if datatype.rounding is None or not half else max(datatype.rounding, HALF_ROUNDING)
        if allowed is None or np.shape(g) != np.shape(a):
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs in a batch of {size}"
        wide = np.asarray(datatype.widened(np.asarray(g)), np.float64)
        reference = np.asarray(datatype.widened(np.asarray(a)), np.float64)
        same = (wide == reference) | (np.isnan(wide) & np.isnan(reference))
        with np.errstate(invalid="ignore"):  # inf - inf, where both are the same
            far = float(np.max(np.abs(wide - reference), where=~same, initial=0.0))
        scale = float(np.max(np.abs(reference), where=np.isfinite(reference), initial=1e-30))
        if not far <= allowed * scale:  # NaN, where only one of the two is, is further than anything
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs by {far:.3g} in a batch of {size}"
        verdict = Invariance.ROUNDING
    return verdict, ""


def _rows(tensor: TensorSpec, count: int, rng: np.random.Generator, sample: NDArray[Any] | None) -> NDArray[Any]:
    if sample is None or not len(sample):
        return example(tensor, count, rng)
    return np.resize(sample, (count, *sample.shape[1:]))
