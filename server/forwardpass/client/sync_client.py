"""Client: numpy in, numpy out, over one gRPC channel, for threads. Its requests are built in `operations`.

`AsyncClient` has the same operations with the same arguments; the two differ only in how a call is made.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, Self, Unpack

import grpc
from numpy.typing import NDArray

from forwardpass.client import control
from forwardpass.client.base import BaseClient, left_of
from forwardpass.client.coalescer import Coalesce
from forwardpass.client.coalescing_threads import ThreadCoalescer
from forwardpass.client.control import ModelStats
from forwardpass.client.errors import CallError
from forwardpass.client.operations import Call, Inputs, Reply, Steps, T
from forwardpass.client.options import INFER, InferOptions, shows
from forwardpass.client.pending import STREAM_PATH
from forwardpass.client.results import Answer, ModelInfo, ModelState, ServerInfo
from forwardpass.client.sync_stream import Stream
from forwardpass.client.tables import is_array


class Client(BaseClient):
    """Calls a server and waits for the answer. Any number of threads may share one client.

    A failed operation raises the CallError subclass for its status, see `errors`; `timeout` is in seconds, None for the
    client's default.
    """

    _open = staticmethod(grpc.insecure_channel)
    _open_secure = staticmethod(grpc.secure_channel)
    _event = threading.Event

    def _make_coalescer(self, coalesce: Coalesce) -> ThreadCoalescer:
        return ThreadCoalescer(self._operations, coalesce, self.address, self._run)

    @shows(INFER)
    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Answer:
        """Send a table, arrays [B, ...] by input name, or the only input's array; get the outputs by name.

        A table is a data frame, a mapping of its columns, or records; each column goes to the input, or the column of
        an input, that has its name (see `tables`).

        Arrays are converted to the model's dtypes if no value changes except by rounding of floats: float64 is accepted
        for FP32, integers if they convert exactly. Otherwise InvalidArgument is raised and nothing is sent. BYTES takes
        and gives arrays of str (bytes, if they are not UTF-8), BF16 its bits as uint16.

        `version` "": the server's choice; `outputs` None: the model's default outputs; `id` is returned in the answer;
        `priority`: 1 is the most urgent, 0 the model's default; `parameters` are sent unchanged; `timings` requests the
        server's timings.
        """
        return self._run(self._operations.infer(model, inputs, **options))

    def predict(
        self,
        model: str,
        x: Inputs,
        *,
        output: str | None = None,
        version: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> NDArray[Any]:
        """The only output: of a model with one input, [B, D_in] to [B, D_out]; a row [D_in] gives a row [D_out]. Of a
        table of B rows, as `infer` takes it, [B, D_out].

        `output` selects one if the model has several. With `coalesce`, calls from several threads share requests.
        """
        if self._coalescer is not None and is_array(x):
            result: NDArray[Any] = self._coalescer.predict(model, x, output, version, timeout, priority)
            return result
        return self._run(
            self._operations.predict(model, x, output=output, version=version, timeout=timeout, priority=priority)
        )

    def stream(self, *, in_flight: int = 64, timeout: float | None = None) -> Stream:
        """A stream for many requests, of which `in_flight` may be unanswered. `timeout` applies to the whole stream."""
        method = self._stream(STREAM_PATH)
        headers = () if self._tracing is None else self._tracing.headers()

        def start(requests: Iterator[bytes]) -> Any:
            return method(requests, timeout=timeout, metadata=self._metadata(headers))

        return Stream(self._operations, self._run, start, lambda e: self._failure(e, timeout), self.address, in_flight)

    def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelInfo:
        """A model's inputs, outputs and versions, always requested anew."""
        return self._run(self._operations.metadata(model, version=version, timeout=timeout))

    def models(self, *, ready: bool = False, timeout: float | None = None) -> list[ModelState]:
        """Every model in the server's repository; with `ready`, only those that serve."""
        return self._run(self._operations.models(ready=ready, timeout=timeout))

    def load(self, model: str, *, timeout: float | None = None) -> None:
        """Load a model, or load it again from its folder; returns once it serves, which may take longer than a call.

        Needs a server with explicit control of models, and with tokens the role admin, as `unload` does. Raises
        FailedPrecondition with the reason if the model cannot be loaded; versions that served continue to.
        """
        self._run(control.load(self._operations.ask, model, timeout))

    def unload(self, model: str, *, timeout: float | None = None) -> None:
        """Stop serving a model; returns once accepted requests are finished."""
        self._run(control.unload(self._operations.ask, model, timeout))

    def statistics(self, model: str = "", *, version: str = "", timeout: float | None = None) -> list[ModelStats]:
        """What each served version did so far; of one model, or of all."""
        return self._run(control.statistics(self._operations.ask, model, version, timeout))

    def config(self, model: str, *, version: str = "", timeout: float | None = None) -> dict[str, Any]:
        """A model's options, with those that the server chose, as the protocol's ModelConfig."""
        return self._run(control.config(self._operations.ask, model, version, timeout))

    def log_level(self, level: str | None = None, *, timeout: float | None = None) -> str:
        """The level of the server's log; first set to `level` (debug, info, warning, error), if given."""
        return self._run(control.log_level(self._operations.ask, level, timeout))

    def server(self, *, timeout: float | None = None) -> ServerInfo:
        """The server's name and version, and the extensions of the protocol that it offers."""
        return self._run(self._operations.server(timeout=timeout))

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server answers. False, not an error, if none does (or, with `health_check`, if none serves)."""
        return self._run(self._operations.live(timeout=timeout))

    def ready(self, model: str | None = None, *, version: str = "", timeout: float | None = None) -> bool:
        """Whether the server, or one model, is ready for requests. False, not an error, if no server is reachable."""
        return self._run(self._operations.ready(model, version=version, timeout=timeout))

    def close(self) -> None:
        """Close the connection. Calls in flight raise Cancelled; later ones raise ValueError."""
        channel = self._end()
        self._closing.set()
        if self._coalescer is not None:
            self._coalescer.close()
        if channel is not None:
            channel.close()
        if self._coalescer is not None:
            self._coalescer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    reply = self._make(call) if self._tracing is None else self._traced(call)
                except CallError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except CallError as error:
            # Without the frames of this library and gRPC's own error, which say nothing that the text does not.
            raise error.with_traceback(None) from None

    def _traced(self, call: Call) -> Reply:
        assert self._tracing is not None
        with self._tracing.span(call.path) as headers:
            return self._make(call._replace(metadata=(*call.metadata, *headers)))

    def _make(self, call: Call) -> Reply:
        began = time.monotonic()
        timeout = call.timeout
        for attempt in itertools.count(1):
            method = self._methods.get(call.path) or self._method(call.path)
            try:
                message, done = method.with_call(call.request, timeout=timeout, metadata=self._metadata(call.metadata))
            except grpc.RpcError as error:
                pause = self._pause(self._failure(error, call.timeout), call, attempt, began)
            except ValueError:
                self._raise_closed()
                raise
            else:
                return Reply(message, done.trailing_metadata() if call.metadata else ())
            if self._closing.wait(pause):
                self._raise_closed()
            timeout = left_of(call, began)
        raise AssertionError
