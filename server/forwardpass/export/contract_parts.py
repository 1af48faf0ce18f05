"""The parts of a contract that every exporter makes: tolerances, rows, labels, and what it cannot show. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from forwardpass.errors import ExportError
from forwardpass.model.contract import Contract, Tolerance
from forwardpass.model.contract_tensor import ContractTensor

# The allowed error, by the narrowest float in the network: a few hundred roundings of its last place.
TOLERANCES = {
    np.dtype(np.float16): Tolerance(rtol=1e-2, atol=1e-3),
    np.dtype(np.float32): Tolerance(rtol=1e-4, atol=1e-5),
    np.dtype(np.float64): Tolerance(rtol=1e-10, atol=1e-12),
}
# The contract is read at every start of a server: it holds at most this many rows, and this many numbers, of an input.
_SAMPLE_ROWS = 8
_SAMPLE_NUMBERS = 65_536

Words = Mapping[str, Sequence[str]]  # by tensor
Labels = Sequence[str] | Words
Values = dict[str, NDArray[Any]]
Part = TypeVar("Part", ContractTensor, Contract)


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A written version."""

    path: Path  # <repository>/<name>/<version>
    contract: Contract
    parameters: int  # number of trained values
    row_difference: float | None  # largest difference between a row alone and in a batch; None: no batch
    doubts: tuple[str, ...] = ()  # why the contract checks less than it could


def scaled(tolerance: Tolerance, expected: Values) -> Tolerance:
    """With an absolute tolerance for answers of this size: one for answers about 1 would take small ones for zeros."""
    floats = [answer[np.isfinite(answer)] for answer in expected.values() if answer.dtype.kind == "f"]
    largest = max((float(np.abs(answer).max()) for answer in floats if answer.size), default=1.0)
    return tolerance.model_copy(update={"atol": tolerance.atol * largest}) if 0 < largest < 0.1 else tolerance


def doubts_of(expected: Values, drawn: bool) -> tuple[str, ...]:
    """What the contract's answers cannot show. Raises ExportError where they show nothing.

    `drawn`: the rows were drawn at random.
    """
    remedy = "; the rows were drawn at random: give real ones (--samples, samples=)" if drawn else ""
    found = []
    for name, answer in expected.items():
        rows = answer.reshape(len(answer), -1) if answer.ndim else answer.reshape(1, 1)
        if answer.dtype.kind == "f":
            odd = int((~np.isfinite(rows)).any(axis=1).sum())
            if rows.size and not np.isfinite(rows).any():
                raise ExportError(
                    f"every answer {name!r} of the contract is NaN or infinite, so that it would check nothing{remedy}"
                )
            if odd:
                found.append(f"{odd} of {len(rows)} answers {name!r} of the contract hold NaN or infinity{remedy}")
        if len(rows) > 1 and rows.size and (rows == rows[:1]).all():
            found.append(f"all {len(rows)} answers {name!r} of the contract are the same{remedy}")
    return tuple(found)


def sample_count(rows: Values) -> int:
    numbers = max(math.prod(value.shape[1:]) for value in rows.values())
    return max(1, min(_SAMPLE_ROWS, _SAMPLE_NUMBERS // max(numbers, 1)))


def described(
    inputs: list[ContractTensor], outputs: list[ContractTensor], labels: Labels | None, categories: Words | None
) -> tuple[list[ContractTensor], list[ContractTensor]]:
    """Inputs and outputs with the labels, and the inputs with the categories. Raises ExportError."""
    names = [tensor.name for tensor in outputs]
    if labels is not None and not isinstance(labels, Mapping):
        if len(outputs) > 1:
            raise ExportError(f"labels: expected a mapping by output, as there are several: {', '.join(names)}")
        labels = {names[0]: labels}
    columns = [tensor.name for tensor in inputs]
    for what, given, known, those in (
        ("labels", labels, {*names, *columns}, f"outputs are {', '.join(names)}, the inputs {', '.join(columns)}"),
        ("categories", categories, set(columns), f"inputs are {', '.join(columns)}"),
    ):
        if unknown := sorted(set(given or ()) - known):
            raise ExportError(f"{what}: are for {', '.join(unknown)}; the {those}")
    return (
        [_with(_with(tensor, "labels", labels), "categories", categories) for tensor in inputs],
        [_with(tensor, "labels", labels) for tensor in outputs],
    )


def _with(tensor: ContractTensor, field: str, words: Words | None) -> ContractTensor:
    if words is None or tensor.name not in words:
        return tensor
    return checked(ContractTensor, **{**tensor.model_dump(), field: [str(word) for word in words[tensor.name]]})


def checked(part: type[Part], **fields: Any) -> Part:
    try:
        return part(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ExportError(first["msg"].removeprefix("Value error, ")) from error
