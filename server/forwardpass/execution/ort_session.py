"""One network on one ONNX Runtime execution provider: opened, described, run. Independent of requests.

Opening may take seconds, so it is done off the hot path. Opening and `run` release the interpreter's lock; on the CPU
provider several threads may call `run` at once.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InvalidRequest, ModelError, Reason, RequestError, RunFailed, TooLarge
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_private import run_bound_of, run_of
from forwardpass.execution.placement import Placement
from forwardpass.execution.session import Arrays
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.observability.gpu import GpuBatchRecord
from forwardpass.protocol import BY_ORT_TYPE

OPTIMIZATIONS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# Parts of ONNX Runtime's error texts when memory is short, or when no memory could be enough.
OUT_OF_MEMORY = (
    "bad_alloc", "llocate", "out of memory", "Out of memory", "size overflowed", "STATUS_ALLOC_FAILED",
    "is smaller than requested bytes",
)  # fmt: skip
# Its texts where an operator refuses a request's values or shapes with the status FAIL, which no other sign tells from
# faults of its own.
REFUSED_VALUES = re.compile(
    r"out of (data )?bounds|Out of range value|nteger (division|modulo) by zero|k argument \[|value of k must"
    r"|nvalid sequence length|\bsto[dfl]$|[Dd]imension mismatch|[Mm]ismatched dimensions|dimensions must match"
    r"|Attempting to broadcast|ReshapeHelper|SqueezeBase|IsAxisInRange|Scale value should be"
    r"|Tensor shape\.Size\(\) must be >= 0"
)


def share_threads(threads: int) -> None:
    """Share one pool of `threads` threads among the process's sessions. Call before the first session with `shared`.

    ONNX Runtime allows no mixture: from then on a session with its own pool can't be opened.
    """
    ort.set_global_thread_pool_sizes(threads, 1)


class OrtSession:
    """An open network. `signature` has its inputs and outputs."""

    def __init__(
        self,
        path: Path,
        placement: Placement,
        optimizations: str = "all",
        opened: Any = None,
        opening: Callable[[Any], None] = lambda _: None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        """Open `path`. Raises ModelError with the runtime's reason on failure.

        `optimizations`: allowed graph optimizations: none, basic, extended or all. `opened`: an open ONNX Runtime
        session to use instead of opening one. `opening`: called with the session options before a session is opened, to
        add to them or to cancel the opening later. `provider_options`: ONNX Runtime's options for the provider.
        """
        if opened is None:
            options = session_options(placement, optimizations)
            opening(options)
            try:
                opened = ort.InferenceSession(
                    str(path), options, providers=[(placement.provider, dict(provider_options or {}))]
                )
            except Exception as error:
                raise ModelError(f"{path.name} cannot be opened: {reason(error)}") from None
        # ONNX Runtime silently falls back to the CPU if a provider can't start.
        got = opened.get_providers()[0]
        if got != placement.provider:
            raise ModelError(f"asked for {placement.provider}; ONNX Runtime offers only {got}")
        self._session = opened
        self.placement = placement
        self.signature = read_signature(self._session)
        self._names = [t.name for t in self.signature.outputs]
        self._chosen: dict[tuple[int, ...], list[str]] = {}  # places -> names, made once
        self._inputs = [t.name for t in self.signature.inputs]
        self._call = run_of(self._session)
        datatypes = {t.datatype for t in (*self.signature.inputs, *self.signature.outputs)}
        self._has_bits = any(datatype.as_bits for datatype in datatypes)
        if self._has_bits and any(datatype.numpy is None for datatype in datatypes):
            raise ModelError("it has BF16 and BYTES tensors, which ONNX Runtime cannot be given in one call")

    def run(self, arrays: Sequence[NDArray[Any]], outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        """The outputs at the places `outputs` for one array per input.

        Raises InvalidRequest if the network rejects the values, TooLarge if memory runs out, else RunFailed.
        """
        names = self._chosen.get(outputs)
        if names is None:
            names = self._chosen[outputs] = [self._names[i] for i in outputs]
        try:
            if self._has_bits:
                return self._run_values(arrays, names, options)
            found: list[NDArray[Any]] = self._call(names, dict(zip(self._inputs, arrays, strict=True)), options)
            return found
        except Exception as error:
            raise translate(error) from None

    # -- Session: trivial here except `bound` -------------------------------------------------------------------------

    how = ""
    own_thread = False

    def prepare(self, rows: int, pads: bool, samples: Arrays, half: bool = False) -> None:
        """Does nothing: any size can be run as it is."""

    def room(self, rows: int) -> None:  # noqa: ARG002
        return None

    def long_task(self, job: Callable[[], object]) -> None:  # noqa: ARG002
        return None

    def report_to(self, ran: Callable[[GpuBatchRecord], None]) -> None:
        """Does nothing: it uses no device."""

    def close(self, seconds: float = 10.0) -> bool:  # noqa: ARG002
        return True

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> Callable[[Any], None] | None:
        binding = self._session.io_binding()
        # The values are views of the arrays, which the caller must keep alive.
        binding.bind_ortvalue_input(self._inputs[0], ort.OrtValue.ortvalue_from_numpy(given))
        binding.bind_ortvalue_output(self._names[place], ort.OrtValue.ortvalue_from_numpy(found))
        run_bound, argument = run_bound_of(self._session)
        return partial(run_bound, argument(binding))

    def _run_values(self, arrays: Sequence[NDArray[Any]], names: list[str], options: Any) -> list[NDArray[Any]]:
        """As `run` for a type that numpy lacks, bfloat16: its bits are passed in and out."""
        feeds = {}
        for tensor, array in zip(self.signature.inputs, arrays, strict=True):
            if tensor.datatype.as_bits:
                bits = np.ascontiguousarray(array)
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.datatype.as_bits)
            else:
                value = ort.OrtValue.ortvalue_from_numpy(array)
            feeds[tensor.name] = value
        found = []
        for value in self._session.run_with_ort_values(names, feeds, options):
            datatype = BY_ORT_TYPE[value.data_type()]
            if not datatype.as_bits:
                found.append(value.numpy())
                continue
            shape = value.shape()
            nbytes = int(np.prod(shape)) * datatype.itemsize
            memory = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""
            found.append(np.frombuffer(memory, datatype.numpy).reshape(shape))
        return found


def session_options(placement: Placement, optimizations: str) -> Any:
    """ONNX Runtime session options: threads, optimizations, logging of errors only."""
    options = ort.SessionOptions()
    options.graph_optimization_level = OPTIMIZATIONS[optimizations]
    if placement.shared:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = placement.threads
        options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are raised too, and clients could fill stderr with them
    # Spinning threads waste a core between requests to save microseconds within one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def new_run_options(shrink_arena: bool = False) -> Any:
    """New run options. Setting `.terminate` ends the run; used by the watchdog.

    `shrink_arena`: at its end, the run gives unused memory of the CPU's arena back.
    """
    options = ort.RunOptions()
    if shrink_arena:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def set_memory(options: Any, arena: bool, pattern: bool) -> None:
    """Set whether sessions with these options keep the memory of runs, and whether they allocate it in one piece."""
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = pattern


def read_signature(session: Any) -> ModelSignature:
    """A network's inputs and outputs as declared in its file. Outputs of types that can't be sent are in `unsendable`.

    Raises ModelError for inputs of such types, and where no output is left.
    """

    def tensors(nodes: Any) -> tuple[tuple[TensorSpec, ...], tuple[tuple[str, str], ...]]:
        found, other = [], []
        for node in nodes:
            datatype = BY_ORT_TYPE.get(node.type)
            if datatype is None:
                other.append((node.name, node.type))
                continue
            shape = tuple(s if isinstance(s, int) and s >= 0 else -1 for s in node.shape)
            found.append(TensorSpec(node.name, datatype, shape))
        return tuple(found), tuple(other)

    (inputs, wrong), (outputs, unsendable) = tensors(session.get_inputs()), tensors(session.get_outputs())
    for name, kind in wrong or (unsendable if not outputs else ()):
        what = "input" if wrong else "output"
        raise ModelError(f"{what} '{name}' is of type {kind}, which the protocol cannot carry")
    if not outputs:
        raise ModelError("the network has no outputs")
    batchable = bool(inputs) and all(t.shape and t.shape[0] == -1 for t in (*inputs, *outputs))
    defaulted = frozenset(node.name for node in session.get_overridable_initializers())
    return ModelSignature(inputs, outputs, batchable, defaulted=defaulted, unsendable=unsendable)


def reason(error: BaseException) -> str:
    """ONNX Runtime's error text without prefix and source positions, on one line of at most 300 characters."""
    return _said(error)[:300]


def _said(error: BaseException) -> str:
    text = str(error)
    _, found, status = text.partition("Status Message:")
    text = status if found else text
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r" ; GPU=-?\d+ ; hostname=.*", "", text, flags=re.DOTALL)  # of a CUDA error: place and line
    text = re.sub(r"\S+\.(?:cc|h|cpp):\d+\s*", "", text)
    return " ".join(text.split())


def _beyond(text: str) -> str:
    """The figures in the arena's refusal, in words; empty: it is another's."""
    found = re.search(r"Available memory of (\d+) is smaller than requested bytes of (\d+)", text)
    if found is None:
        return ""
    return f": it asks for {found[2]} bytes more, {found[1]} are left of --cpu-memory"


def translate(error: Exception) -> RequestError:
    """Translate a run's exception to the error for its requests."""
    kind = type(error).__name__
    text = str(error)
    if isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY):
        return TooLarge(f"there is not enough memory for this run{_beyond(text)}", reason=Reason.OUT_OF_MEMORY)
    if kind == "InvalidArgument" or REFUSED_VALUES.search(_said(error)):
        return InvalidRequest(f"the network cannot be run on these values: {reason(error)}")
    return RunFailed(f"the run failed: {reason(error)}")
