"""One instance of a model on one CUDA device: fixed buffers, a graph for each batch size, a thread and a stream.

A batch is stacked into page-locked memory; then a copy in, one replay of the graph for its size and a copy out are
enqueued on the stream, which is waited for once. The session's own thread does all of that, from opening on. This
module decides which networks get graphs; docs/gpu.md lists what has been run on a device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import DeviceLost, ForwardpassError, ModelError
from forwardpass.execution.cuda import detect, graph_sizes
from forwardpass.execution.cuda.device_thread import DeviceThread, LongTask
from forwardpass.execution.cuda.driver import CudaError, Driver
from forwardpass.execution.cuda.network import CudaNetwork, Opener, open_with_onnx_runtime
from forwardpass.execution.ort_session import reason
from forwardpass.execution.placement import Placement
from forwardpass.model.signature import ModelSignature
from forwardpass.observability.gpu import GpuBatchRecord, RunKind
from forwardpass.protocol import Datatype

TIMED_EVERY = 16  # one batch in so many is timed on the device: four timing events cost as much as the copies
# The largest difference between a graph's outputs and a plain run's, relative to the largest value: rounding only.
TOLERANCE = {"BF16": 1e-2, "FP16": 1e-2, "FP32": 1e-4, "FP64": 1e-10}

Arrays = Sequence[NDArray[Any]]


class CudaSession:
    """A Session on `placement.device`. `run` may be called by any thread; all work is done by the session's own.

    - Until `prepare`, every run is plain: ONNX Runtime copies in and out itself.
    - Padding rows in a larger graph hold data of earlier batches, or zeros; their results are never returned.
    - `ran` is called for every batch, on the session's thread.
    """

    def __init__(
        self,
        path: Path,
        where: Placement,
        optimizations: str = "all",
        *,
        driver: Driver | None = None,
        opener: Opener = open_with_onnx_runtime,
        name: str = "cuda",
    ) -> None:
        """Open `path`. Raises ModelError with the reason on failure.

        `driver`: for tests, of a simulated device. `name`: of the thread.
        """
        self.placement = where
        self.graph_sizes: tuple[int, ...] = ()  # rows of the graphs, ascending
        self.how = ""  # how batches are run, for the start-up report
        self.ran: Callable[[GpuBatchRecord], None] = _nobody
        self.graph_replays = 0
        self._rows = 0  # most rows that the buffers hold
        self._pads = False
        self._half = False
        self._inputs: list[NDArray[Any]] = []  # the buffers on the host
        self._outputs: list[NDArray[Any]] = []
        self._given: list[NDArray[Any]] | None = None
        self._batches = 0
        driver = detect.driver() if driver is None else driver
        self._thread = DeviceThread(name)
        try:
            self._network = self._thread.call(partial(CudaNetwork, path, where, optimizations, driver, opener))
        except BaseException:
            self._thread.end()
            raise
        self.signature: ModelSignature = self._network.plain.signature
        self._ident = self._thread.ident
        # The last reference may be dropped by any thread, which must not wait.
        self._end = weakref.finalize(self, self._thread.end, self._network.free)
        self._end.atexit = False

    # -- before it serves ---------------------------------------------------------------------------------------------

    def prepare(self, rows: int, pads: bool, samples: Arrays, half: bool = False) -> None:
        """Allocate buffers for batches of up to `rows` rows; capture and check graphs for 1, 2, 4 ... `rows` rows.

        `pads`: rows are independent, so that a batch may be run in a larger graph; else only at a graph's own size.
        `samples`: rows of each input that the graphs are checked with, at least one. `half`: products keep 10 bits of
        mantissa (half precision, TF32), whatever type the outputs have, so other kernels may round as much. The result
        is in `graph_sizes` and `how`. Raises ModelError if memory is short, DeviceLost if the device fails.
        """
        self._half = half
        self._thread.call(partial(self._prepare, rows, pads, samples))

    def _prepare(self, rows: int, pads: bool, samples: Arrays) -> None:
        why = graph_sizes.obstacle(self.signature)
        if why:
            self.how = f"plain runs, without fixed buffers or CUDA graphs, because {why}"
            return
        network = self._network
        try:
            staging = network.allocate(rows)
        except CudaError as error:
            raise ModelError(f"{self.placement.label} has no room for batches of {rows} rows: {error}") from None
        self._inputs, self._outputs = staging.inputs.arrays, staging.outputs.arrays
        self._rows, self._pads = rows, pads
        why = network.refused or self._capture(graph_sizes.sizes(rows), samples)
        if not why:
            self.how = f"CUDA graphs for batches of {', '.join(map(str, self.graph_sizes))} rows"
            return
        self.how = f"fixed buffers without CUDA graphs, because {why}"
        wrong = self._checked((1, rows), samples)
        if wrong:
            self._inputs, self._outputs, self._rows = [], [], 0
            network.forget_buffers()
            self.how = f"plain runs, without fixed buffers or CUDA graphs, because {why}; and {wrong}"

    def _capture(self, sizes: tuple[int, ...], samples: Arrays) -> str:
        """Capture and check a graph of each size. Returns the reason why graphs can't be used; empty if they can."""
        network = self._network
        try:
            for size in reversed(sizes):  # the smaller graphs reuse the memory that the largest allocates
                network.capture(size)
            self.graph_sizes = sizes
            why = self._checked(sizes, samples)
        except Exception as error:
            failure = network.failed(error)
            if isinstance(failure, DeviceLost):
                raise failure from None
            why = reason(error)
        if why:
            self.graph_sizes = ()
            network.forget_graphs()
        return why

    def _checked(self, sizes: tuple[int, ...], samples: Arrays) -> str:
        """The first error of runs of these sizes in the buffers; empty if there is none. Raises DeviceLost."""
        try:
            for size in sizes:
                self._check(size, samples)
        except DeviceLost:
            raise
        except ForwardpassError as error:
            return str(error)
        return ""

    def _check(self, size: int, samples: Arrays) -> None:
        """Raises ModelError if a run in the buffers differs from a plain run, RequestError if it fails.

        Two batches of different rows are run one after the other: earlier buffer contents must not affect the outputs.
        They would if an output was computed when a graph was captured, or if ONNX Runtime copied an input when it was
        bound, as it does for an input that the CPU reads.
        """
        places = tuple(range(len(self.signature.outputs)))
        for rows in sorted({size // 2 + 1, size} if self._pads else {size}):
            real = [np.resize(sample, (rows, *sample.shape[1:])) for sample in samples]
            for arrays in ([np.zeros_like(array) for array in real], real):
                wanted = self._network.run_plainly(arrays, places)
                found = self.run(arrays, places)
                for tensor, got, expected in zip(self.signature.outputs, found, wanted, strict=True):
                    if not _agree(got, expected, tensor.datatype, self._half):
                        what = (
                            f"the graph for {size} rows"
                            if self.graph_sizes
                            else f"a run of {rows} rows in fixed buffers"
                        )
                        raise ModelError(f"{what} gives another '{tensor.name}' than a plain run")

    # -- batches ------------------------------------------------------------------------------------------------------

    def room(self, rows: int) -> list[NDArray[Any]] | None:
        """Arrays [rows, ...], one per input, to stack the next batch into; None: it may lie anywhere.

        They are valid until `run`, to which this same list must be passed.
        """
        if not 0 < rows <= self._rows or threading.get_ident() != self._ident:
            return None
        self._given = [array[:rows] for array in self._inputs]
        return self._given

    def run(self, arrays: Arrays, outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        """As Session.run. For arrays from `room`, the outputs are valid until the next call of `room` or `run`.

        A graph cannot be interrupted; a run without one can be ended between two operators by `options`.
        """
        if threading.get_ident() != self._ident:
            return self._thread.call(lambda: self.run(arrays, outputs, options))
        given, self._given = self._given, None
        if arrays is given:
            return self._in_buffers(len(given[0]), outputs, options)
        if not self._fits(arrays):
            found = self._network.run_plainly(arrays, outputs, options)
            self.ran(GpuBatchRecord(self.placement.device, "plain"))
            return found
        rows = len(arrays[0])
        for room, array in zip(self._inputs, arrays, strict=True):
            room[:rows] = array
        return [output.copy() for output in self._in_buffers(rows, outputs, options)]

    def _fits(self, arrays: Arrays) -> bool:
        return all(
            len(array) <= self._rows and array.shape[1:] == room.shape[1:]
            for room, array in zip(self._inputs, arrays, strict=False)
        ) and bool(self._rows)

    def _in_buffers(self, rows: int, outputs: tuple[int, ...], options: Any) -> list[NDArray[Any]]:
        """Run the first `rows` rows of the buffers. Returns views of the outputs there."""
        if rows:
            graph_size = graph_sizes.choose(self.graph_sizes, rows, self._pads)
            self._batches += 1
            timed = not self._batches % TIMED_EVERY
            try:
                times = self._network.batch(rows, graph_size, outputs, timed, options)
            except Exception as error:
                raise self._network.failed(error) from None
            way: RunKind = "graph" if graph_size is not None else "bound"
            self.graph_replays += graph_size is not None
            self.ran(GpuBatchRecord(self.placement.device, way, *(times or ())))
        return [self._outputs[place][:rows] for place in outputs]

    # -- serving and the end ------------------------------------------------------------------------------------------

    own_thread = True

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> None:  # noqa: ARG002
        return None  # every run goes through the buffers

    def report_to(self, ran: Callable[[GpuBatchRecord], None]) -> None:
        self.ran = ran

    def long_task(self, job: Callable[[], object]) -> LongTask:
        """A task that runs `job` on the session's thread. Runs called from other threads wait until it is done."""
        return self._thread.long_task(job)

    def close(self, seconds: float = 10.0) -> bool:
        """Free everything and end the thread. Returns whether it ended in time. Nothing may be called afterwards."""
        self._inputs, self._outputs, self._given, self._rows = [], [], None, 0
        self._end()
        return self._thread.join(seconds)


def _nobody(_: GpuBatchRecord) -> None:
    pass


def _agree(got: NDArray[Any], expected: NDArray[Any], datatype: Datatype, half: bool) -> bool:
    if got.shape != expected.shape:
        return False
    allowed = TOLERANCE.get("FP16" if half and datatype.name in TOLERANCE else datatype.name)
    if allowed is None:
        return bool(np.array_equal(got, expected))
    got, expected = datatype.widened(got), datatype.widened(expected)
    wide, reference = got.astype(np.float64), expected.astype(np.float64)
    same = (wide == reference) | (np.isnan(wide) & np.isnan(reference))
    with np.errstate(invalid="ignore"):  # inf - inf, where both are equal
        far = float(np.max(np.abs(wide - reference), where=~same, initial=0.0))
    scale = float(np.max(np.abs(reference), where=np.isfinite(reference), initial=0.0))
    return far <= allowed * scale
