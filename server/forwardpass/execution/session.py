"""What an execution provider gives: a network that is open and can be run. No provider is named here.

`Runnable` is all that measuring, probing and warming up need; a `Session` is what serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from forwardpass.execution.placement import Placement
from forwardpass.model.signature import ModelSignature
from forwardpass.observability.gpu import GpuBatchRecord

Arrays = Sequence[NDArray[Any]]


class Runnable(Protocol):
    """A network that can be run, wherever that is."""

    @property
    def signature(self) -> ModelSignature:
        """What it takes and gives."""

    def run(self, arrays: Arrays, outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        """The outputs at the places `outputs` for one array per input. Raises RequestError.

        `options`: run options of ONNX Runtime, by which another thread may end the run.
        """


class Task(Protocol):
    """A job on a thread, as threading.Thread has it."""

    def start(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class Session(Runnable, Protocol):
    """An open network of one instance, or of all those that may share it."""

    @property
    def placement(self) -> Placement:
        """Where it runs."""

    @property
    def how(self) -> str:
        """How batches are run, for the start-up report; empty: there is nothing to say."""

    @property
    def own_thread(self) -> bool:
        """Whether it runs on a thread of its own alone. If not, any thread may call `run`, several at a time."""

    def prepare(self, rows: int, pads: bool, samples: Arrays, half: bool = False) -> None:
        """Make ready for batches of up to `rows` rows, before it serves. Raises ModelError or DeviceLost.

        `pads`: rows are independent, so that a batch may be run among rows that nobody asked for. `samples`: real rows
        of each input, at least one. `half`: products keep 10 bits of mantissa, whatever type the outputs have.
        """

    def room(self, rows: int) -> Sequence[NDArray[Any]] | None:
        """Arrays [rows, ...], one an input, to stack the next batch into; None: it may lie anywhere."""

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> Callable[[Any], None] | None:
        """A run of the only input, always in `given`, to the output at `place`, always into `found`; None: no such run.

        Both are C-contiguous and have the tensors' types and sizes. It takes run options, and is not thread-safe. It
        raises what ONNX Runtime raises.
        """

    def long_task(self, job: Callable[[], object]) -> Task | None:
        """`job` to be started on the session's own thread; None: it has none."""

    def report_to(self, ran: Callable[[GpuBatchRecord], None]) -> None:
        """Have `ran` called with what became of every batch on a device."""

    def close(self, seconds: float = 10.0) -> bool:
        """Free everything. Returns whether that ended within `seconds`. Nothing may be called afterwards."""
