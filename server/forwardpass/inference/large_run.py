"""A large request while it runs, in several turns: its inputs, the outputs of the turns joined, and what they took.

Its turns may run at the same time on several instances, whose threads share this.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import RunFailed
from forwardpass.execution.stacking import Buffer, stack
from forwardpass.inference.request_template import RequestTemplate
from forwardpass.model.signature import ModelSignature
from forwardpass.observability.model_metrics import BatchRecord
from forwardpass.protocol.timings import BatchTiming

Arrays = Sequence[NDArray[Any]]


class JoinedOutputs:
    """Outputs [rows, ...] of consecutive matrices, in arrays that the first one's outputs decide. Thread-safe."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.arrays: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def put(self, first: int, rows: int, outputs: Arrays) -> None:
        """Copy the outputs of `rows` rows from row `first` on. Raises RunFailed if they have other rows, ValueError if
        they don't fit those before."""
        for output in outputs:
            if not output.ndim or output.shape[0] != rows:
                raise RunFailed(f"an output has shape {list(output.shape)} for {rows} rows: axis 0 is not the batch")
        with self._lock:
            if not self.arrays:
                self.arrays = [np.empty((self.rows, *output.shape[1:]), output.dtype) for output in outputs]
        for array, output in zip(self.arrays, outputs, strict=True):
            if array.shape[1:] != output.shape[1:]:
                raise ValueError(  # the model is at fault, not the client: for the log
                    f"slices have outputs of sizes {list(array.shape[1:])} and {list(output.shape[1:])} a row, "
                    "although rows are said to be independent"
                )
            array[first : first + rows] = output


class LargeRun:
    """What the turns of one request share."""

    def __init__(self, template: RequestTemplate, buffers: Sequence[Buffer], taken: float) -> None:
        self.outputs = JoinedOutputs(template.rows)
        self.matrices: list[int] = []
        self.seconds = 0.0  # in the network, of all turns
        self.taken = taken  # when its first turn began
        self._template = template
        self._buffers = buffers
        self._inputs: Arrays | None = None
        self._lock = threading.Lock()

    def inputs(self, signature: ModelSignature) -> Arrays:
        """Its inputs [rows, ...], made once."""
        with self._lock:
            if self._inputs is None:
                shapes = self._template.batch_shapes
                self._inputs = [
                    stack(tensor, [buffer], shape)
                    for tensor, buffer, shape in zip(signature.inputs, self._buffers, shapes, strict=True)
                ]
            return self._inputs

    def ran(self, matrices: Sequence[int], seconds: float) -> None:
        """Record a turn. Its worker's lock is held."""
        self.matrices += matrices
        self.seconds += seconds

    def timing(self, ended: float) -> BatchTiming:
        return BatchTiming(self.taken, self.seconds, ended, sum(self.matrices))

    def note(self, arrival: float, ended: float, done: float, answered: int) -> BatchRecord:
        """The request as one batch. What it waited between its turns counts as waiting, not as encoding."""
        began = max(arrival, ended - self.seconds)
        return BatchRecord(((arrival, 1),), self.matrices, began, min(self.seconds, ended - began), done, answered)
