"""AsyncClient: the operations of Client for the tasks of one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from numpy.typing import NDArray

from forwardpass.client import control
from forwardpass.client.async_stream import AsyncStream
from forwardpass.client.base import BaseClient, left_of
from forwardpass.client.coalescer import Coalesce
from forwardpass.client.coalescing_tasks import AsyncCoalescer
from forwardpass.client.control import ModelStats
from forwardpass.client.errors import CallError, Cancelled
from forwardpass.client.operations import Call, Inputs, Reply, Steps, T
from forwardpass.client.options import INFER, InferOptions, shows
from forwardpass.client.pending import STREAM_PATH
from forwardpass.client.results import Answer, ModelInfo, ModelState, ServerInfo
from forwardpass.client.tables import is_array


class AsyncClient(BaseClient):
    """The operations of Client for asyncio: every operation is awaited.

    Belongs to the event loop in which it is first used; any number of its tasks may use it concurrently.
    """

    _open = staticmethod(grpc.aio.insecure_channel)
    _open_secure = staticmethod(grpc.aio.secure_channel)
    _event = asyncio.Event

    def _make_coalescer(self, coalesce: Coalesce) -> AsyncCoalescer:
        return AsyncCoalescer(self._operations, coalesce, self.address, self._run)

    @shows(INFER)
    async def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Answer:
        """See `Client.infer`. Cancelling the task cancels the call."""
        return await self._run(self._operations.infer(model, inputs, **options))

    async def predict(
        self,
        model: str,
        x: Inputs,
        *,
        output: str | None = None,
        version: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> NDArray[Any]:
        """See `Client.predict`."""
        if self._coalescer is not None and is_array(x):
            result: NDArray[Any] = await self._coalescer.predict(model, x, output, version, timeout, priority)
            return result
        return await self._run(
            self._operations.predict(model, x, output=output, version=version, timeout=timeout, priority=priority)
        )

    def stream(self, *, in_flight: int = 64, timeout: float | None = None) -> AsyncStream:
        """See `Client.stream`. Not awaited, but must be called in the running loop."""
        method = self._stream(STREAM_PATH)
        headers = () if self._tracing is None else self._tracing.headers()

        def start(requests: AsyncIterator[bytes]) -> Any:
            return method(requests, timeout=timeout, metadata=self._metadata(headers))

        return AsyncStream(
            self._operations, self._run, start, lambda e: self._failure(e, timeout), self.address, in_flight
        )

    async def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelInfo:
        """See `Client.metadata`."""
        return await self._run(self._operations.metadata(model, version=version, timeout=timeout))

    async def models(self, *, ready: bool = False, timeout: float | None = None) -> list[ModelState]:
        """See `Client.models`."""
        return await self._run(self._operations.models(ready=ready, timeout=timeout))

    async def load(self, model: str, *, timeout: float | None = None) -> None:
        """See `Client.load`."""
        await self._run(control.load(self._operations.ask, model, timeout))

    async def unload(self, model: str, *, timeout: float | None = None) -> None:
        """See `Client.unload`."""
        await self._run(control.unload(self._operations.ask, model, timeout))

    async def statistics(self, model: str = "", *, version: str = "", timeout: float | None = None) -> list[ModelStats]:
        """See `Client.statistics`."""
        return await self._run(control.statistics(self._operations.ask, model, version, timeout))

    async def config(self, model: str, *, version: str = "", timeout: float | None = None) -> dict[str, Any]:
        """See `Client.config`."""
        return await self._run(control.config(self._operations.ask, model, version, timeout))

    async def log_level(self, level: str | None = None, *, timeout: float | None = None) -> str:
        """See `Client.log_level`."""
        return await self._run(control.log_level(self._operations.ask, level, timeout))

    async def server(self, *, timeout: float | None = None) -> ServerInfo:
        """See `Client.server`."""
        return await self._run(self._operations.server(timeout=timeout))

    async def live(self, *, timeout: float | None = None) -> bool:
        """See `Client.live`."""
        return await self._run(self._operations.live(timeout=timeout))

    async def ready(self, model: str | None = None, *, version: str = "", timeout: float | None = None) -> bool:
        """See `Client.ready`."""
        return await self._run(self._operations.ready(model, version=version, timeout=timeout))

    async def close(self) -> None:
        """Close the connection. Calls in flight raise Cancelled; later ones raise ValueError."""
        channel = self._end()
        self._closing.set()
        if self._coalescer is not None:
            self._coalescer.close()
        if channel is not None:
            await channel.close()
        if self._coalescer is not None:
            await self._coalescer.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    reply = await (self._make(call) if self._tracing is None else self._traced(call))
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

    async def _traced(self, call: Call) -> Reply:
        assert self._tracing is not None
        with self._tracing.span(call.path) as headers:
            return await self._make(call._replace(metadata=(*call.metadata, *headers)))

    async def _make(self, call: Call) -> Reply:
        began = time.monotonic()
        timeout = call.timeout
        for attempt in itertools.count(1):
            method = self._methods.get(call.path) or self._method(call.path)
            try:
                doing = method(call.request, timeout=timeout, metadata=self._metadata(call.metadata))
                message = await doing
                return Reply(message, await doing.trailing_metadata() if call.metadata else ())
            except grpc.aio.AioRpcError as error:
                pause = self._pause(self._failure(error, call.timeout), call, attempt, began)
            except grpc.aio.UsageError:
                self._raise_closed()
                raise
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    doing.cancel()
                    raise
                # The task was not cancelled: the channel was closed during the call.
                raise Cancelled("the client was closed") from None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)
                self._raise_closed()
            timeout = left_of(call, began)
        raise AssertionError
