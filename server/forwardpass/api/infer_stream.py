"""ModelStreamInfer: many requests on one stream, several in flight, one response to each in order of arrival.

A request that fails is answered in-band with its error's text, and the stream goes on; for a client that sends the
metadata `triton_grpc_error: true` the stream ends with the error's status instead. Independent of batches; used on the
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from forwardpass import protocol
from forwardpass.errors import Draining, RequestError
from forwardpass.protocol.status import text_of, write_parameters
from forwardpass.protocol.timings import BatchTiming
from forwardpass.protocol.wire import varint
from forwardpass.transport.interface import Answer, CallContext

logger = logging.getLogger(__name__)

IN_FLIGHT = 1024  # requests of one stream; one more is read once the first of them is answered
STRICT_KEY: Final = "triton_grpc_error"  # request metadata

Reply = tuple[Answer, BatchTiming | None]

# Every request has one response, so each response is its request's last. This is the entry of
# ModelInferResponse.parameters by which clients recognise the last one, to append to any serialised response.
_FINAL = protocol.ModelInferResponse()
_FINAL.parameters["triton_final_response"].bool_param = True
FINAL: Final[bytes] = _FINAL.SerializeToString()
INFER_RESPONSE = b"\x12"  # tag of ModelStreamInferResponse.infer_response (field 2, length-delimited)


class Infer(Protocol):
    """The destination of requests."""

    def submit(
        self,
        message: bytes,
        seconds_left: float | None,
        timings: bool,
        context: CallContext | None = None,
        method: str = ...,
    ) -> asyncio.Future[Reply]: ...

    def abandon(self, future: asyncio.Future[Reply]) -> None:
        """The caller no longer waits for this, or it was answered."""


class InferStream:
    """One call. `serve` is its whole life; every request that was read is answered or abandoned by its end."""

    def __init__(self, infer: Infer, context: CallContext) -> None:
        self._infer = infer
        self._context = context
        self._strict = any(k == STRICT_KEY and v == "true" for k, v in context.metadata)
        # Requests in order of arrival; None: there are no more.
        self._sent: asyncio.Queue[tuple[bytes, asyncio.Future[Reply]] | None] = asyncio.Queue(IN_FLIGHT)
        self._reading: asyncio.Task[None] | None = None
        self._ending = False

    def end(self) -> None:
        """Read no more, answer what was read, then end with UNAVAILABLE: the server is stopping."""
        self._ending = True
        if self._reading is not None:
            self._reading.cancel()

    async def serve(self) -> None:
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(_seen)
        try:
            await self._answer()
        finally:
            self._reading.cancel()
            while not self._sent.empty():
                waiting = self._sent.get_nowait()
                if waiting is not None:
                    self._infer.abandon(waiting[1])
        failure = None if self._reading.cancelled() or not self._reading.done() else self._reading.exception()
        if isinstance(failure, RequestError):  # of a message that could not be inflated
            raise failure
        if self._ending:
            raise Draining("the server is stopping; send this to another one")

    async def _read(self) -> None:
        try:
            while (message := await self._context.read()) is not None:
                future = self._infer.submit(
                    message, self._context.seconds_left, False, self._context, "ModelStreamInfer"
                )
                try:
                    await self._sent.put((message, future))
                except asyncio.CancelledError:
                    self._infer.abandon(future)
                    raise
        except asyncio.CancelledError:
            if not self._ending:
                raise
        finally:
            with contextlib.suppress(asyncio.QueueFull):
                self._sent.put_nowait(None)

    async def _answer(self) -> None:
        while (waiting := await self._next()) is not None:
            message, future = waiting
            try:
                answer, _ = await future
            finally:
                self._infer.abandon(future)
            if isinstance(answer, RequestError):
                if self._strict:
                    raise answer
                await self._context.write(stream_error(message, answer))
            else:
                await self._context.write(stream_response(answer))

    async def _next(self) -> tuple[bytes, asyncio.Future[Reply]] | None:
        """The oldest unanswered request; None: there are no more."""
        assert self._reading is not None
        if self._reading.done() and self._sent.empty():
            return None
        return await self._sent.get()


def _seen(reading: asyncio.Task[None]) -> None:
    """Retrieve a failed read's exception, which only ended the stream; otherwise asyncio would log an error."""
    if not reading.cancelled() and reading.exception() is not None:
        logger.debug("a stream could not be read to its end: %s", reading.exception())


def stream_response(answer: bytes) -> bytes:
    """A ModelInferResponse as a ModelStreamInferResponse, marked as its request's last."""
    return INFER_RESPONSE + varint(len(answer) + len(FINAL)) + answer + FINAL


def stream_error(message: bytes, error: RequestError) -> bytes:
    """An error as a ModelStreamInferResponse that identifies the request by whatever can be parsed of it."""
    response = protocol.ModelStreamInferResponse(error_message=text_of(error))
    request = protocol.ModelInferRequest()
    with contextlib.suppress(DecodeError, RuntimeError):
        request.ParseFromString(message)
        response.infer_response.id = request.id
        response.infer_response.model_name = request.model_name
        response.infer_response.model_version = request.model_version
    said = response.infer_response.parameters
    said["triton_final_response"].bool_param = True
    write_parameters(error, said)
    data: bytes = response.SerializeToString()
    return data
