"""A lone request: one row through a network that is bound to its buffers once, not at every run.

ONNX Runtime's Python binding makes tensors from the arguments and a new array for the output at every run, which for a
small network takes as long as a third of the run itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RequestError
from forwardpass.execution.ort_session import translate
from forwardpass.execution.session import Session
from forwardpass.execution.stacking import Buffer
from forwardpass.model.example_inputs import example
from forwardpass.model.signature import ModelSignature, TensorSpec


class SingleRowRunner:
    """Runs one row of the only input to one row of one output. Not thread-safe: it has one set of buffers.

    `place` is the output's place, `trailing` its shape without the batch axis. The results are those of `Session.run`.
    """

    def __init__(self, place: int, given: NDArray[Any], found: NDArray[Any], run: Callable[[Any], None]) -> None:
        """`run`: from `given`, one row of the input, to `found`, the output's row; see Session.bound."""
        self.place = place
        self.trailing = found.shape[1:]
        # Byte views of the arrays that the network is bound to, to avoid numpy's overhead.
        self._bytes_in = given.data.cast("B")
        self._bytes_out = found.data.cast("B")
        self._run = run

    def answer(self, row: Buffer, options: Any) -> bytes:
        """The output's bytes for `row`. Raises as `Session.run` does."""
        self._bytes_in[:] = row
        try:
            self._run(options)
        except Exception as error:
            raise translate(error) from None
        return bytes(self._bytes_out)


def bind(signature: ModelSignature, session: Session) -> SingleRowRunner | None:
    """A runner for single rows; None if not possible: variable sizes, several inputs or outputs, types numpy lacks."""
    places = signature.default_outputs
    if not signature.one_row_bytes or len(places) != 1:
        return None
    tensors = (*signature.inputs, signature.outputs[places[0]])
    if not all(_plain(tensor) for tensor in tensors):
        return None
    given = example(signature.inputs[0], 1, np.random.default_rng(0))
    try:
        (found,) = session.run([given], places)
        if found.shape != (1, *tensors[-1].shape[1:]):
            return None
        own_given, own_found = np.zeros_like(given, order="C"), np.zeros_like(found, order="C")
        run = session.bound(own_given, places[0], own_found)
        if run is None:
            return None
        single = SingleRowRunner(places[0], own_given, own_found, run)
        same = single.answer(given.tobytes(), None) == found.tobytes()
    except RequestError:
        return None  # a network that rejects made-up values
    return single if same else None


def _plain(tensor: TensorSpec) -> bool:
    return tensor.datatype.numpy is not None and not tensor.datatype.as_bits and min(tensor.shape[1:], default=1) > 0
