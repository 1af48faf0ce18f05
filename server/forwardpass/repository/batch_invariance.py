"""Is batching safe? Whether a row's answer is the same alone and among others, found out by running the network.

Two different things can go wrong in a batch. The answer may depend on the neighbours' values, or on the row's place
among them (dynamic quantisation, batch statistics, attention over the wrong axis, experts with a capacity): such a
model must not be batched. Or the run of another size rounds differently in the last bits: harmless, yet reported.
So rows are compared alone, among different neighbours, in shuffled places of batches of different sizes, the largest of
which is the one that will be served. What was not seen to differ may still differ: a contract that declares dependence
has the last word.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.execution.session import Runnable
from forwardpass.model.example_inputs import example
from forwardpass.model.row_flow import UNPROVED, Proof, RowFlow
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.protocol import DATATYPES

HALF_ROUNDING = DATATYPES["FP16"].rounding or 0.0
ROWS = 8  # rows that are compared at once; each is run alone and in every batch
EVERY_SIZE, EVERY_SECONDS = 33, 0.5  # rows, for every batch up to which the bits are compared; and for how long
SEEDS = 3  # of rows, neighbours and places; the first is tried in batches of every size, the others in the largest

Run = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]


class Invariance(enum.Enum):
    """`value` is the label in metrics and metadata."""

    EXACT = "exact"  # the same bits
    ROUNDING = "rounding"  # the same but for rounding; independent of the neighbours
    DEPENDENT = "dependent"  # neighbours change the answer, or it could not be run: served one request at a time
    ASSERTED = "asserted"  # by the model's options; not probed
    NONE = "none"  # axis 0 is not a batch

    @property
    def batches(self) -> bool:
        return self in (Invariance.EXACT, Invariance.ROUNDING, Invariance.ASSERTED)


def probe(
    signature: ModelSignature,
    run: Run,
    largest: int,
    samples: Sequence[NDArray[Any]] | None,
    half: bool = False,
    proof: Proof = UNPROVED,
) -> tuple[Invariance, str]:
    """The verdict and its reason. `largest`: rows of the largest batch that will serve; `samples`: real rows per input,
    if known. Values that are made up need not be ones that the network takes where there are real ones.

    `half`: the network computes in half precision, whatever type its outputs have: that is how they may be rounded.
    `proof`: from the graph. Where it proves that rows are independent, differences between batches of different
    sizes are rounding, however large, and a network that takes no made-up values is believed.
    """
    if not signature.batchable:
        return Invariance.NONE, "axis 0 is not a batch of any size"
    if proof.flow is RowFlow.MIXES:
        return Invariance.DEPENDENT, proof.why
    proved = proof.flow is RowFlow.INDEPENDENT
    signature = _as_wide(signature, samples)
    allowed = math.inf if proved else 1.0
    sizes = sorted({ROWS, *(size for size in (2 * ROWS + 1, largest) if 1 < size <= largest)})
    exact = True
    compared = 0
    trial: _Trial | None = None
    for seed in range(SEEDS):
        # Real rows may all be alike in what matters, so that made-up ones are compared as well.
        real = samples if seed == 0 else None
        try:
            made = _Trial(
                signature,
                run,
                half=half,
                allowed=allowed,
                samples=samples,
                real=real,
                rng=np.random.default_rng((20_240_229, seed)),
            )
            if (odd := made.without_rows()) is not None:
                return Invariance.NONE, odd
            for size in sizes if seed == 0 else sizes[-1:]:
                verdict, why = made.compare(size, thorough=seed == 0)
                if not verdict.batches:
                    return verdict, f"{why}, although its graph mixes no rows" if proved else why
                exact = exact and verdict is Invariance.EXACT
        except RequestError as error:
            if proved and not compared:
                return (
                    Invariance.ROUNDING,
                    f"{RowFlow.INDEPENDENT.value}; not compared, since it could not be run: {error}",
                )
            if not proved and (samples is None or seed == 0):
                return Invariance.DEPENDENT, f"the probe could not be run: {error}"
        else:
            trial = made
            compared += ROWS
    where = f"{compared} rows alone and in batches of up to {sizes[-1]}"
    how = f"{RowFlow.INDEPENDENT.value}; " if proved else ""
    if exact and trial is not None and _same_bits(trial, largest):
        return Invariance.EXACT, f"{how}{where}: the same bits"
    return Invariance.ROUNDING, f"{how}{where}: equal except for rounding"


def probe_again(
    signature: ModelSignature,
    run: Run,
    largest: int,
    samples: Sequence[NDArray[Any]] | None,
    half: bool,
    first: tuple[bool, str],
) -> tuple[Invariance, str] | None:
    """As `probe`, for a network whose own graph is proved independent, of a shape that was probed: fewer runs.

    Its weights are its own, so its rows are compared as well: alone, among all neighbours in a small batch, and in the
    largest. `first`: whether the network that was probed had the same bits in batches of every size, and its name: to
    those sizes there is nothing but that. None: `probe` has to decide.
    """
    rng = np.random.default_rng((20_240_229, 0))
    exact, other = first
    signature = _as_wide(signature, samples)
    try:
        trial = _Trial(signature, run, half=half, allowed=math.inf, samples=samples, real=samples, rng=rng)
        if trial.without_rows() is not None:
            return None
        for size in sorted({ROWS, largest} if largest > 1 else {ROWS}):
            verdict, _ = trial.compare(size, thorough=size == ROWS)
            if not verdict.batches:
                return None
            exact = exact and verdict is Invariance.EXACT
    except RequestError:
        return None
    how = f"{RowFlow.INDEPENDENT.value}; {ROWS} rows alone and in batches of up to {max(ROWS, largest)}"
    if exact:
        return Invariance.EXACT, f"{how}: the same bits, as in those of more sizes of {other}, of the same shape"
    return Invariance.ROUNDING, f"{how}: equal except for rounding, there or of {other}, of the same shape"


def _as_wide(signature: ModelSignature, samples: Sequence[NDArray[Any]] | None) -> ModelSignature:
    """With inputs as wide as `samples`, if there are any, for what is made up."""
    if samples is None:
        return signature
    shaped = [dataclasses.replace(t, shape=(-1, *s.shape[1:])) for t, s in zip(signature.inputs, samples, strict=True)]
    return dataclasses.replace(signature, inputs=tuple(shaped))


def _same_bits(trial: _Trial, largest: int) -> bool:
    """Whether answers have the same bits in batches of every size up to EVERY_SIZE as well, and around powers of two.

    Kernels take elements by the vector and the rest one by one, so a size may round as no other does.
    """
    more = {size + off for size in (32, 64, 128, 256, 512) for off in (-1, 1)}
    until = time.perf_counter() + EVERY_SECONDS
    for size in sorted({*range(2, EVERY_SIZE + 1), *more}):
        if size <= largest:
            try:
                if trial.compare(size, thorough=False)[0] is not Invariance.EXACT:
                    return False
            except RequestError:
                return False  # made-up neighbours that the network refuses
            if time.perf_counter() > until:
                return False  # not found out, so not claimed
    return True


def batched_outputs(
    signature: ModelSignature, session: Runnable, samples: Sequence[NDArray[Any]] | None
) -> ModelSignature:
    """The signature with a batch axis for outputs that are declared [1, ...] and have a row for each of the inputs'.

    Converters of tables write such declarations. As it is where inputs have no batch axis, or a run finds none.
    """
    if signature.batchable or not all(t.shape and t.shape[0] == -1 for t in signature.inputs) or not signature.inputs:
        return signature
    if not all(t.shape and t.shape[0] in (-1, 1) for t in signature.outputs):
        return signature
    rng = np.random.default_rng(0)
    rows = 3  # no size that a file declares by chance
    made = [
        example(t, rows, rng) if samples is None else np.resize(samples[i], (rows, *samples[i].shape[1:]))
        for i, t in enumerate(signature.inputs)
    ]
    try:
        found = session.run(made, tuple(range(len(signature.outputs))))
    except RequestError:
        return signature
    if not all(output.ndim and len(output) == rows for output in found):
        return signature
    outputs = tuple(dataclasses.replace(t, shape=(-1, *t.shape[1:])) for t in signature.outputs)
    return dataclasses.replace(signature, outputs=outputs, batchable=True)


class _Trial:
    """ROWS rows, and their answers alone."""

    def __init__(
        self,
        signature: ModelSignature,
        run: Run,
        *,
        half: bool,
        allowed: float,
        samples: Sequence[NDArray[Any]] | None,
        real: Sequence[NDArray[Any]] | None,
        rng: np.random.Generator,
    ) -> None:
        """Run each row alone. `real`: rows to compare; None makes them up. Raises RequestError.

        `allowed`: how many times the datatype's rounding a row may differ by from batch to batch.
        """
        self._allowed = allowed
        self._signature, self._run, self._half, self._samples, self._rng = signature, run, half, samples, rng
        self._rows = [_rows(t, ROWS, rng, real[i] if real else None) for i, t in enumerate(signature.inputs)]
        self._alone = [run([r[i : i + 1] for r in self._rows]) for i in range(ROWS)]

    def without_rows(self) -> str | None:
        """Which output of a single row has no axis of rows, as after a squeeze of all axes; None: all have one."""
        for output, tensor in zip(self._alone[0], self._signature.outputs, strict=True):
            if not output.ndim:
                return f"output '{tensor.name}' has shape [] for one row: axis 0 is not the batch"
        return None

    def compare(self, size: int, thorough: bool) -> tuple[Invariance, str]:
        """The rows in batches of `size`, at places drawn once, among neighbours of several kinds. Raises RequestError.

        The same places with other neighbours distinguish dependence from rounding: not even rounding may differ then.
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
            for output, tensor in zip(outputs, self._signature.outputs, strict=True):
                if not output.ndim or len(output) != size:
                    why = f"output '{tensor.name}' has shape {list(output.shape)} for {size} rows"
                    return Invariance.NONE, f"{why}: axis 0 is not the batch"
            outputs = [o[places] for o in outputs]
            for i in range(len(places)):
                got, alone = [o[i] for o in outputs], [o[0] for o in self._alone[i]]
                verdict, why = _compare(got, alone, self._signature, size, self._half, self._allowed)
                if verdict is Invariance.DEPENDENT:
                    return verdict, why
                exact = exact and verdict is Invariance.EXACT
            if seen is not None and not all(_equal(a, b) for a, b in zip(seen, outputs, strict=True)):
                return Invariance.DEPENDENT, f"in a batch of {size}, other neighbours change a row's answer"
            seen = outputs
        return Invariance.EXACT if exact else Invariance.ROUNDING, ""

    def _neighbours(self, size: int, thorough: bool) -> Iterator[tuple[bool, list[NDArray[Any]]]]:
        """Whole batches, in which the rows then take their places; and whether the network may refuse the values."""
        inputs, rng = self._signature.inputs, self._rng
        texts = any(tensor.datatype.numpy is None for tensor in inputs)
        for scale in (1.0, 100.0) if thorough else (1.0,):
            picky = self._samples is not None or (texts and scale != 1.0)
            yield picky, [example(t, size, rng, scale) for t in inputs]
        if thorough:
            # One row of NaN, or of the largest numbers, must not change what the others get.
            for value in (np.nan, np.inf, -np.inf):
                yield True, [_filled(t, size, rng, value) for t in inputs]
        # All alike, so that they crowd together wherever rows are counted: at one expert, in one bucket.
        yield False, [np.repeat(r[:1], size, axis=0) for r in self._rows]
        if self._samples is not None:
            chosen = rng.integers(0, len(self._samples[0]), size)
            yield False, [np.array(s[chosen]) for s in self._samples]


def _filled(tensor: TensorSpec, size: int, rng: np.random.Generator, value: float) -> NDArray[Any]:
    """Random rows, every other one of them full of `value` where the type has it."""
    made = example(tensor, size, rng)
    if made.dtype.kind == "f":
        made[::2] = value
    return made


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()


def _compare(
    got: Sequence[NDArray[Any]],
    alone: Sequence[NDArray[Any]],
    signature: ModelSignature,
    size: int,
    half: bool,
    times: float,
) -> tuple[Invariance, str]:
    """One row's answers in a batch of `size` against those alone."""
    verdict = Invariance.EXACT
    for g, a, tensor in zip(got, alone, signature.outputs, strict=True):
        if _equal(np.asarray(g), np.asarray(a)):
            continue
        datatype = tensor.datatype
        allowed = datatype.rounding if datatype.rounding is None or not half else max(datatype.rounding, HALF_ROUNDING)
        if (allowed is None and times <= 1.0) or np.shape(g) != np.shape(a):
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs in a batch of {size}"
        if allowed is None:  # a label or a number that rounding tipped over
            verdict = Invariance.ROUNDING
            continue
        wide = np.asarray(datatype.widened(np.asarray(g)), np.float64)
        reference = np.asarray(datatype.widened(np.asarray(a)), np.float64)
        same = (wide == reference) | (np.isnan(wide) & np.isnan(reference))
        with np.errstate(invalid="ignore"):  # inf - inf, where both are the same
            far = float(np.max(np.abs(wide - reference), where=~same, initial=0.0))
        scale = float(np.max(np.abs(reference), where=np.isfinite(reference), initial=1e-30))
        if not far <= allowed * times * scale:  # NaN, where only one of the two is, is further than anything
            return Invariance.DEPENDENT, f"output '{tensor.name}' differs by {far:.3g} in a batch of {size}"
        verdict = Invariance.ROUNDING
    return verdict, ""


def _rows(tensor: TensorSpec, count: int, rng: np.random.Generator, sample: NDArray[Any] | None) -> NDArray[Any]:
    if sample is None or not len(sample):
        return example(tensor, count, rng)
    return np.resize(sample, (count, *sample.shape[1:]))
