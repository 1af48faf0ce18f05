"""The interface of an open network, independent of the execution provider.

`Runnable` suffices for measuring, probing and warming up; serving needs a `Session`.
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
    """A network that can be run, on any device."""

    @property
    def signature(self) -> ModelSignature:
        """Its inputs and outputs."""

    def run(self, arrays: Arrays, outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        """The outputs at the places `outputs` for one array per input. Raises RequestError.

        `options`: ONNX Runtime run options, by which another thread can end the run.
        """


class Task(Protocol):
    """A job on a thread, with the methods of threading.Thread."""

    def start(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class Session(Runnable, Protocol):
    """An open network of one instance, or of all instances that share it."""

    @property
    def placement(self) -> Placement:
        """Where it runs."""

    @property
    def how(self) -> str:
        """How batches are run, for the start-up report; may be empty."""

    @property
    def own_thread(self) -> bool:
        """Whether it runs only on its own thread. If not, any thread may call `run`, several at a time."""

    def prepare(self, rows: int, pads: bool, samples: Arrays, half: bool = False) -> None:
        """Prepare for batches of up to `rows` rows, before serving. Raises ModelError or DeviceLost.

        `pads`: rows are independent, so that a batch may be padded with other rows. `samples`: real rows of each input,
        at least one. `half`: products keep 10 bits of mantissa, whatever type the outputs have.
        """

    def room(self, rows: int) -> Sequence[NDArray[Any]] | None:
        """Arrays [rows, ...], one per input, to stack the next batch into; None: it may lie anywhere."""

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> Callable[[Any], None] | None:
        """A run of the only input, always in `given`, to the output at `place`, always in `found`; None: unsupported.

        Both are C-contiguous and have the tensors' types and sizes. It is called with run options, is not
        thread-safe, and raises ONNX Runtime's exceptions.
        """

    def long_task(self, job: Callable[[], object]) -> Task | None:
        """A task that runs `job` on the session's own thread; None: it has none."""

    def report_to(self, ran: Callable[[GpuBatchRecord], None]) -> None:
        """Set the function called with a record of every batch run on a device."""

    def close(self, seconds: float = 10.0) -> bool:
        """Free everything. Returns whether this finished within `seconds`. Nothing may be called afterwards."""
