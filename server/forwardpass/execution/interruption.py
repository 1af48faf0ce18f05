"""Interrupts loading a model when the server stops: between two runs, within one, and while a network is opened.

A load can't be killed, and one still in native code when the interpreter ends aborts the process. So a load must run
its network through `network`, and pass its session options to `opening` before it opens one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from forwardpass.errors import RequestError, Stopping
from forwardpass.execution.ort_session import new_run_options
from forwardpass.execution.session import Runnable
from forwardpass.model.signature import ModelSignature


class Interruption:
    """Thread-safe. `stop` is permanent. For any number of loads, each made by one thread.

    - After `stop`, `check` and every run of a `network` raise Stopping.
    - A run in progress at `stop` ends between two operators; an opening ends between two steps of the optimizer.
    - A single operator cannot be interrupted.
    """

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._run_options = new_run_options()
        self._opening: dict[int, Any] = {}  # by thread: options of the session that it opens, or opened last

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """Interrupt loads. Does not block."""
        with self._lock:
            self._stopping.set()
            self._run_options.terminate = True
            self._cancel()

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until `stop`."""
        self._stopping.wait(seconds)

    def check(self) -> None:
        """Raises Stopping after `stop`."""
        if self._stopping.is_set():
            raise Stopping("the server is stopping")

    def opening(self, options: Any) -> None:
        """Register the ONNX Runtime session options of a session about to be opened. Raises Stopping after `stop`."""
        self.check()
        with self._lock:
            self._opening[threading.get_ident()] = options
            if self._stopping.is_set():
                self._cancel()

    def _cancel(self) -> None:
        for options in self._opening.values():
            cancel = getattr(options, "set_load_cancellation_flag", None)  # since ONNX Runtime 1.21
            if cancel is not None:
                cancel(True)

    def network(self, network: Runnable) -> Runnable:
        """The same network, with runs that end at `stop`."""
        return _Interruptible(network, self, self._run_options)


class _Interruptible:
    """A network whose runs raise Stopping once the server stops, whatever else they would have raised."""

    def __init__(self, network: Runnable, interruption: Interruption, options: Any) -> None:
        self._network = network
        self._interruption = interruption
        self._options = options

    @property
    def signature(self) -> ModelSignature:
        return self._network.signature

    def run(self, arrays: Sequence[NDArray[Any]], outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        self._interruption.check()
        try:
            return self._network.run(arrays, outputs, options or self._options)
        except RequestError:
            self._interruption.check()
            raise
