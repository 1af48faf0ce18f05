"""Checks an ONNX file against its reference: the same outputs within a tolerance, for batches of many sizes.

Also measures whether a row's output depends on its neighbours. Runs ONNX Runtime's CPU provider, on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import ExportError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.export.input_spec import InputSpec
from forwardpass.model.contract import Tolerance, compare
from forwardpass.model.contract_tensor import DTYPES, ContractTensor
from forwardpass.protocol import DATATYPES

if TYPE_CHECKING:
    from forwardpass.export.torch_network import TorchNetwork, Values

PROVIDER = "CPUExecutionProvider"
# One row, a pair, an odd number, and sizes around those that kernels process at a time.
BATCH_SIZES = (1, 2, 3, 8, 17, 64)

_DATATYPES = {d.ort: d.name for d in DATATYPES.values() if not d.as_bits}


@dataclass(frozen=True, slots=True)
class RowIndependence:
    """How far a row's output depends on its neighbours in a batch."""

    bit_identical: bool  # every tested row has the same bits alone and in every batch
    within_tolerance: bool  # equal within the tolerance: rows do not mix, but kernels may round differently
    largest: float  # the largest difference between a row alone and in a batch


class OnnxRunner:
    """An ONNX file on ONNX Runtime's CPU provider."""

    def __init__(self, path: Path) -> None:
        """Raises ExportError if ONNX Runtime can't load the file."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its errors are raised as exceptions too
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:
            raise ExportError(f"ONNX Runtime {ort.__version__} does not load it: {_first_line(error)}") from error
        self.outputs = [_tensor(value) for value in self._session.get_outputs()]

    def check_inputs(self, specs: Iterable[InputSpec]) -> None:
        """Check that the file takes the declared inputs, with symbols still of any size. Raises ExportError."""
        taken = {value.name: _tensor(value) for value in self._session.get_inputs()}
        for spec in specs:
            declared = spec.tensor()
            got = taken.get(spec.name)
            if got is None:
                raise ExportError(f"the exported network lost the input {spec.name!r}; it takes {', '.join(taken)}")
            for dim, size in zip(spec.dims, got.shape, strict=True):
                if isinstance(dim, str) and size != -1:
                    raise ExportError(f"the network works for {dim} = {size} alone; expected any size in {spec}")
            if got != declared:
                raise ExportError(f"the exported network takes {got}; expected {declared}")

    def run(self, values: Values) -> dict[str, NDArray[Any]]:
        """Run the network; the outputs by name. Raises ExportError."""
        try:
            answers = self._session.run(None, dict(values))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
            raise ExportError(f"ONNX Runtime fails on {shapes}: {_first_line(error)}") from error
        return {tensor.name: np.asarray(answer) for tensor, answer in zip(self.outputs, answers, strict=True)}


def check_parity(runner: OnnxRunner, network: TorchNetwork, trials: Iterable[Values], tolerance: Tolerance) -> float:
    """Run every trial in both. Returns the largest difference. Raises ExportError at the first that is off."""
    largest = 0.0
    for values in trials:
        answers = runner.run(values)
        difference = compare(answers, network.expected(values), tolerance)
        if difference.failure is not None:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
            raise ExportError(
                f"the exported network answers differently ({network.reference} reference, {shapes}): "
                f"{difference.failure}"
            )
        for tensor in runner.outputs:
            got = answers[tensor.name]
            sizes_fit = all(want in (-1, size) for want, size in zip(tensor.shape, got.shape, strict=True))
            if got.dtype != DTYPES[tensor.datatype] or not sizes_fit:
                raise ExportError(f"output {tensor.name!r} came as {got.dtype} {list(got.shape)}; expected {tensor}")
        largest = max(largest, difference.largest)
    return largest


def check_outputs_follow(runner: OnnxRunner, rows: Values, symbol: str) -> None:
    """Check that every output has a row for every input row. Raises ExportError naming one that has not."""
    for count in (2, 3, 1):
        for name, answer in runner.run(take(rows, slice(count))).items():
            if count == 1 and answer.shape[:1] != (1,):
                raise ExportError(
                    f"output {name!r} has shape {list(answer.shape)} for one row; expected [1, ...]: a squeeze() "
                    "without an axis takes the batch away where it is one row; name the axis, as in squeeze(-1)"
                )
            if answer.ndim == 0 or answer.shape[0] != count:
                raise ExportError(
                    f"output {name!r} has shape {list(answer.shape)} for {count} rows; expected a row for each "
                    f"(axis 0 of the inputs, {symbol!r}, is the batch: give it a fixed size if it is not)"
                )


def row_independence(runner: OnnxRunner, rows: Values, count: int, tolerance: Tolerance) -> RowIndependence:
    """Compare each of the `count` rows alone with the same row in batches of every size."""
    alone = [runner.run(take(rows, slice(i, i + 1))) for i in range(count)]
    identical = within = True
    largest = 0.0
    for size in BATCH_SIZES:
        for start in range(0, count - size + 1, size):
            for name, answer in runner.run(take(rows, slice(start, start + size))).items():
                single = np.concatenate([one[name] for one in alone[start : start + size]])
                text = answer.dtype == object
                if not np.array_equal(answer, single) if text else answer.tobytes() != single.tobytes():
                    difference = compare({name: answer}, {name: single}, tolerance)
                    identical = False
                    within = within and difference.failure is None
                    largest = max(largest, difference.largest)
    return RowIndependence(identical, within, largest)


def take(rows: Values, which: slice | NDArray[np.intp]) -> dict[str, NDArray[Any]]:
    """Some rows of every input."""
    return {name: value[which] for name, value in rows.items()}


def _tensor(value: Any) -> ContractTensor:
    datatype = _DATATYPES.get(value.type)
    if datatype is None:
        raise ExportError(f"{value.name!r} is a {value.type}, which has no name in the protocol")
    return ContractTensor(
        name=value.name, datatype=datatype, shape=[d if isinstance(d, int) else -1 for d in value.shape]
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
