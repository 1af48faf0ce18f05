"""One sample row of a served model, as the JSON that an inference request has: of its contract, else made up. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.console.array_files import plain
from forwardpass.execution.reshaped_session import in_client_shape
from forwardpass.model.example_inputs import example
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.repository.loader import LoadedModel

MOST_ELEMENTS = 65_536  # of one row's tensors together: a form is no place for more


def sample(loaded: LoadedModel, row: int) -> dict[str, Any]:
    """Row number `row`, modulo as many as there are. `expected` is in the network's shape, by output.

    `inputs` is None where a row has more than MOST_ELEMENTS elements.
    """
    signature, contract = loaded.worker.signature, loaded.contract
    if contract is not None:
        try:
            given = contract.input_arrays()
            arrays = in_client_shape(signature.inputs, [given[t.name] for t in signature.inputs])
            rows = contract.samples.rows if contract.batchable and signature.batchable else 1
            row %= rows
            expected = {
                name: plain(values[row : row + 1] if rows > 1 else values)
                for name, values in contract.expected_arrays().items()
            }
            taken = [array[row : row + 1] if rows > 1 else array for array in arrays]
            return {"source": "contract", "rows": rows, "row": row, **_tensors(signature, taken), "expected": expected}
        except ValueError:  # its samples have several rows, where clients send one at a time in a shape without a batch
            pass
    rng = np.random.default_rng(row)
    made = [_made(tensor, signature.batchable, rng) for tensor in signature.inputs]
    return {"source": "made up", "rows": 0, "row": row, **_tensors(signature, made), "expected": None}


def _made(tensor: TensorSpec, batchable: bool, rng: np.random.Generator) -> NDArray[Any]:
    rows = 1 if batchable or not tensor.shape or tensor.shape[0] < 0 else tensor.shape[0]
    array = example(tensor, rows, rng)
    return array if tensor.shape else array.reshape(())


def _tensors(signature: ModelSignature, arrays: Sequence[NDArray[Any]]) -> Mapping[str, Any]:
    if sum(array.size for array in arrays) > MOST_ELEMENTS:
        return {"inputs": None}
    return {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype.name,
                "shape": list(array.shape),
                "data": plain(array.reshape(-1)),
            }
            for tensor, array in zip(signature.inputs, arrays, strict=True)
        ]
    }
