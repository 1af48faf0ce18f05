"""One network open on one CUDA device: its stream, buffers and graphs. Created, used and freed by one thread.

ONNX Runtime captures a graph when a run names a new one (`gpu_graph_id`), after as many ordinary runs as it needs, and
replays it when a run names it again. It keeps graphs for the thread that captured them, and they work on the addresses
that were bound then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forwardpass.errors import DeviceLost, ModelError, RequestError
from forwardpass.execution.cuda.buffers import PinnedBuffers
from forwardpass.execution.cuda.driver import OUT_OF_MEMORY, CudaError, Driver
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_private import run_bound_of
from forwardpass.execution.ort_session import OrtSession, new_run_options, reason, session_options, translate
from forwardpass.execution.placement import CUDA, Placement
from forwardpass.model.signature import TensorSpec

# (file, session options, CUDA provider options) -> an ONNX Runtime session. Tests pass their own.
Opener = Callable[[Path, Any, dict[str, str]], Any]

# A capture fails if any thread synchronizes the whole device meanwhile, as opening a session and freeing memory do.
_ALONE = threading.RLock()
_REFUSED = "graph capture"  # part of ONNX Runtime's error for a network that it can't capture
# Entries of ONNX Runtime's run options.
_GRAPH, _DO_NOT_WAIT = "gpu_graph_id", "disable_synchronize_execution_providers"
_NO_GRAPH = "-1"  # for a run that is neither captured nor replayed
_MOST_BINDINGS = 512  # kept for sizes without a graph


def open_with_onnx_runtime(path: Path, options: Any, device_options: dict[str, str]) -> Any:
    """A session on the device, or on the CPU if the device is not available. Raises ONNX Runtime's exceptions."""
    return ort.InferenceSession(str(path), options, providers=[(CUDA, device_options)], enable_fallback=0)


class CudaNetwork:
    """Not thread-safe. `plain` runs any batch, with ONNX Runtime's own copies.

    - `staging` is set by `allocate`; its addresses do not change.
    - `refused` is ONNX Runtime's reason for not opening it with graphs; empty if it did.
    """

    def __init__(self, path: Path, placement: Placement, optimizations: str, driver: Driver, opener: Opener) -> None:
        """Open `path` on `placement.device`. Raises ModelError."""
        self._path = path
        self._placement = placement
        self._optimizations = optimizations
        self._driver = driver
        self._opener = opener
        self._graphs: dict[int, tuple[Any, Any]] = {}  # rows -> binding, run options
        self._bindings: dict[int, Any] = {}  # rows -> binding, for runs without a graph
        self.staging: PinnedBuffers | None = None
        self.refused = ""
        try:
            driver.use(placement.device)
            self.stream = driver.stream()
        except CudaError as error:
            raise ModelError(f"cuda:{placement.device} cannot be used: {error}") from None
        try:
            with _ALONE:
                self.plain = self._open(graphs=True)
        except BaseException:
            driver.end_stream(self.stream)
            raise

    def _open(self, graphs: bool) -> OrtSession:
        placement = self._placement
        options = session_options(placement, self._optimizations)
        options.enable_mem_pattern = False  # a pattern for every batch size would take its own memory
        device_options = {
            "device_id": str(placement.device),
            "user_compute_stream": str(self.stream),
            "enable_cuda_graph": str(int(graphs)),
            "use_tf32": str(int(placement.allow_tf32)),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE takes memory, and may choose differently at every start
        }
        if placement.memory_limit:
            device_options["gpu_mem_limit"] = str(placement.memory_limit)
        try:
            opened = self._opener(self._path, options, device_options)
        except Exception as error:
            if graphs and _REFUSED in str(error):
                self.refused = reason(error)
                return self._open(graphs=False)
            where = f"cuda:{placement.device}"
            raise ModelError(f"{self._path.name} cannot be opened on {where}: {reason(error)}") from None
        session = OrtSession(self._path, placement, opened=opened)
        self._opened = opened
        self._call, self._argument = run_bound_of(opened)
        return session

    # -- before it serves ---------------------------------------------------------------------------------------------

    def allocate(self, rows: int) -> PinnedBuffers:
        """Buffers for batches of up to `rows` rows. Raises CudaError."""
        with _ALONE:
            self.staging = PinnedBuffers(self._driver, self.plain.signature, rows)
        return self.staging

    def capture(self, rows: int) -> None:
        """Capture a graph for `rows` rows. Raises ONNX Runtime's exceptions; then `forget_graphs` must be called."""
        self._graphs[rows] = (self._bind(rows), _run_options(str(rows)))
        with _ALONE:
            try:
                self._call(*self._graphs[rows])
                self._driver.wait(self.stream)
            except Exception:
                self._driver.end_capture(self.stream)
                raise

    def forget_graphs(self) -> None:
        """Reopen the network without graphs; its buffers stay. Raises ModelError."""
        with _ALONE:
            self._drop()
            self.plain = self._open(graphs=False)

    def forget_buffers(self) -> None:
        """Free the buffers: every run is plain from now on."""
        assert self.staging is not None
        with _ALONE:
            self._bindings.clear()
            self.staging.free()
            self.staging = None

    def _bind(self, rows: int) -> Any:
        """A binding to the first `rows` rows of the buffers."""
        assert self.staging is not None
        signature, device = self.plain.signature, self._placement.device
        binding = self._opened.io_binding()
        for tensor, address in zip(signature.inputs, self.staging.inputs.addresses(), strict=True):
            binding.bind_input(tensor.name, "cuda", device, _element(tensor), (rows, *tensor.shape[1:]), address)
        for tensor, address in zip(signature.outputs, self.staging.outputs.addresses(), strict=True):
            binding.bind_output(tensor.name, "cuda", device, _element(tensor), (rows, *tensor.shape[1:]), address)
        return self._argument(binding)

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(
        self, rows: int, graph_size: int | None, outputs: Sequence[int], timed: bool, options: Any = None
    ) -> tuple[float, float, float] | None:
        """Run the first `rows` rows of the buffers: in the graph of `graph_size`, or at their own size without one.

        Afterwards the outputs at the places `outputs` are in the buffers. Returns the seconds of the copy in, the run
        and the copy out if `timed`. `options`: can end a run without a graph between two operators. Exceptions must be
        translated by `failed`.
        """
        staging, stream, driver = self.staging, self.stream, self._driver
        assert staging is not None
        timing_events = staging.timing_events
        if timed:
            driver.mark(timing_events[0], stream)
        staging.inputs.to_device(rows, stream)
        if timed:
            driver.mark(timing_events[1], stream)
        if graph_size is not None:
            self._call(*self._graphs[graph_size])
        else:
            self._without_graph(rows, options)
        if timed:
            driver.mark(timing_events[2], stream)
        staging.outputs.to_host(outputs, rows, stream)
        if timed:
            driver.mark(timing_events[3], stream)
        driver.wait(stream)
        if not timed:
            return None
        between = driver.between
        return (
            between(timing_events[0], timing_events[1]),
            between(timing_events[1], timing_events[2]),
            between(timing_events[2], timing_events[3]),
        )

    def _without_graph(self, rows: int, options: Any) -> None:
        binding = self._bindings.get(rows)
        if binding is None:
            if len(self._bindings) >= _MOST_BINDINGS:
                self._bindings.clear()
            binding = self._bindings[rows] = self._bind(rows)
        self._call(binding, _run_options(_NO_GRAPH, options))

    def run_plainly(self, arrays: Sequence[Any], outputs: tuple[int, ...], options: Any = None) -> list[Any]:
        """Any batch, with ONNX Runtime's own copies. Raises RequestError."""
        if options is None or _is_set(options, _DO_NOT_WAIT):
            options = new_run_options()
        if not _is_set(options, _GRAPH):
            options.add_run_config_entry(_GRAPH, _NO_GRAPH)
        try:
            return self.plain.run(arrays, outputs, options)
        except RequestError as error:
            raise self.failed(error) from None

    def failed(self, error: Exception) -> RequestError:
        """The error for the requests of a batch that failed with `error`. DeviceLost: nothing can run here any more."""
        lost = self._driver.broken(self.stream)
        if lost:
            return DeviceLost(f"cuda:{self._placement.device} is lost: {lost}")
        if isinstance(error, RequestError):
            return error
        short = isinstance(error, CudaError) and error.code == OUT_OF_MEMORY
        return translate(MemoryError() if short else error)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        self._graphs.clear()
        self._bindings.clear()
        for name in ("_call", "_opened", "plain"):
            self.__dict__.pop(name, None)

    def free(self) -> None:
        """Free everything. Nothing else may be called afterwards."""
        with _ALONE:
            self._drop()
            if self.staging is not None:
                self.staging.free()
            if not self._driver.broken(self.stream):
                self._driver.end_stream(self.stream)


def _element(tensor: TensorSpec) -> Any:
    """The element type in the form that a binding takes."""
    assert tensor.datatype.numpy is not None
    return tensor.datatype.as_bits or tensor.datatype.numpy.type


def _run_options(graph: str, options: Any = None) -> Any:
    """Run options that disable synchronization within the run: `batch` waits once, after the copy out."""
    if options is None:
        options = new_run_options()
    if not _is_set(options, _DO_NOT_WAIT):
        options.add_run_config_entry(_GRAPH, graph)
        options.add_run_config_entry(_DO_NOT_WAIT, "1")
    return options


def _is_set(options: Any, key: str) -> bool:
    """Whether an entry is set, as when slices of a request share options: ONNX Runtime warns if it is set again."""
    try:
        options.get_run_config_entry(key)
    except RuntimeError:
        return False
    return True
