"""Many requests from any number of tasks of one event loop on one ModelStreamInfer call; rules as in `sync_stream`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from forwardpass.client.errors import CallError, Cancelled
from forwardpass.client.operations import Inputs, Operations, Steps
from forwardpass.client.options import MAP, SUBMIT, MapOptions, SubmitOptions, filled, shows
from forwardpass.client.pending import STREAM_CLOSED, PendingRequests, StreamedRequest
from forwardpass.client.results import Answer


class AsyncStream:
    """Requests from any number of tasks of one loop on one call. Made by `AsyncClient.stream`.

        async with client.stream() as stream:
            answer = await stream.infer("digits", x)

    Leaving the context waits for the answers to all requests; leaving it by an exception cancels them.
    """

    def __init__(
        self,
        operations: Operations,
        run: Callable[[Steps[Any]], Awaitable[Any]],
        start: Callable[[AsyncIterator[bytes]], Any],
        failure: Callable[[Any], CallError],
        address: str,
        in_flight: int,
    ) -> None:
        """`start` begins the call with an iterator of requests; `failure` converts its grpc.RpcError."""
        if in_flight < 1:
            raise ValueError(f"in_flight: expected at least 1, got {in_flight}")
        self._operations = operations
        self._run = run
        self._failure = failure
        self._pending = PendingRequests(operations, address)
        self._room = asyncio.Semaphore(in_flight)
        self._in_flight = in_flight
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False
        self._call = start(self._requests())
        self._reader = asyncio.create_task(self._read())

    @shows(SUBMIT)
    async def submit(self, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]) -> asyncio.Future[Answer]:
        """See `Stream.submit`: awaiting it waits for room, awaiting the returned future waits for the answer."""
        chosen = filled(SUBMIT, options)
        wire_id = self._pending.new_id()
        request, info = await self._run(self._operations.streamed(wire_id, model, inputs, chosen))
        await self._room.acquire()
        try:
            if self._closed:
                raise ValueError(STREAM_CLOSED)
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self._pending.add(wire_id, StreamedRequest(future, info, model, chosen["version"], chosen["id"]))
        except BaseException:
            self._room.release()
            raise
        self._outgoing.put_nowait(request)
        return future

    @shows(SUBMIT)
    async def infer(self, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]) -> Answer:
        """Send a request and wait for its answer. Cancelling the task does not affect the stream."""
        return await (await self.submit(model, inputs, **options))

    @shows(MAP)
    def map(
        self, model: str, inputs: Iterable[Inputs] | AsyncIterable[Inputs], **options: Unpack[MapOptions]
    ) -> AsyncIterator[Answer]:
        """See `Stream.map`."""
        chosen = filled(MAP, options)
        outputs = chosen["outputs"]  # perhaps an iterator, and wanted for every request
        wanted = outputs if outputs is None or isinstance(outputs, str) else tuple(outputs)
        return self._answers(model, inputs, {**options, "outputs": wanted})

    async def _answers(
        self, model: str, inputs: Iterable[Inputs] | AsyncIterable[Inputs], options: MapOptions
    ) -> AsyncIterator[Answer]:
        futures: deque[asyncio.Future[Answer]] = deque()
        async for each in _one_by_one(inputs):
            if len(futures) >= self._in_flight:
                yield await futures.popleft()
            futures.append(await self.submit(model, each, **options))
        while futures:
            yield await futures.popleft()

    async def close(self) -> None:
        """Send no more, and wait for the answers to all requests."""
        self._finish()
        await asyncio.wait([self._reader])

    async def cancel(self) -> None:
        """End the stream at once: unanswered requests fail with Cancelled."""
        self._finish()
        self._call.cancel()
        await asyncio.wait([self._reader])

    def _finish(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.put_nowait(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self.close()
        else:
            await self.cancel()

    async def _requests(self) -> AsyncIterator[bytes]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: CallError = Cancelled(STREAM_CLOSED)
        try:
            async for message in self._call:
                if self._pending.on_response(message):
                    self._room.release()
            error = self._pending.over()
        except CallError as fault:
            error = fault
            self._call.cancel()
        except grpc.aio.AioRpcError as fault:
            error = self._failure(fault)
        finally:
            left = self._pending.end(error)
            # Present and later waiters for room must find that the stream has ended.
            for _ in range(left + self._in_flight):
                self._room.release()
            self._outgoing.put_nowait(None)


async def _one_by_one(inputs: Iterable[Inputs] | AsyncIterable[Inputs]) -> AsyncIterator[Inputs]:
    if isinstance(inputs, AsyncIterable):
        async for each in inputs:
            yield each
    else:
        for each in inputs:
            yield each
