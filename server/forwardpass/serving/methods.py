"""Every method of the port but the direct door's ModelInfer, by its path, for whichever door the call came in.

Messages come and go as bytes and are parsed here, so that a malformed one is INVALID_ARGUMENT and nothing internal is
said. Lives on the event loop. A method gets its call as grpcio's asyncio server has it (`context`: read, write, abort
and so on); direct_call.py has another of the kind.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from forwardpass import protocol
from forwardpass.errors import InvalidRequest, RequestError, RunFailed
from forwardpass.protocol.status import status_of
from forwardpass.protocol.timings import TIMINGS_KEY
from forwardpass.serving.auth import Role, Tokens, role_of
from forwardpass.serving.health import Health
from forwardpass.serving.log_limit import LogLimit
from forwardpass.serving.loop_door import LoopDoor
from forwardpass.serving.metrics import ModelMetrics
from forwardpass.serving.reflection import METHOD, Reflection
from forwardpass.serving.reflection import SERVICES as REFLECTION_SERVICES
from forwardpass.serving.stream import Stream

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

FIRST_MESSAGE_SECONDS = 30.0  # a call that has sent no message by then is ended
CODES = {code.value[0]: code for code in grpc.StatusCode}


class Handler(NamedTuple):
    """What answers a method: `function(_, context)` returns the one message of its answer, or None if it `streams`."""

    function: Callable[[Any, Any], Awaitable[bytes | None]]
    streams: bool


class Methods:
    """`services`: handlers by service and method."""

    def __init__(
        self,
        methods: Mapping[str, Callable[[Any], Any]],
        health: Health,
        metrics: ModelMetrics,
        door: LoopDoor,
        tokens: Tokens | None = None,
        reflection: bool = False,
    ) -> None:
        """`methods`: the inference service's unary methods but ModelInfer, from message to message.

        `tokens` None: whoever reaches the port may call everything. `reflection`: offer server reflection.
        """
        self._health = health
        self._metrics = metrics
        self._door = door
        self._tokens = tokens
        self._streams: set[Stream] = set()
        inference = {
            "ModelInfer": self._unary(self._infer, Role.INFER),
            "ModelStreamInfer": Handler(self._stream, True),
        }
        for name, method in methods.items():
            inference[name] = self._unary(self._plain(protocol.METHODS[name].request, method), role_of(name))
        self.services = {protocol.INFERENCE_SERVICE: inference, protocol.HEALTH_SERVICE: self.health}
        if reflection:
            answering = Reflection((*self.services, protocol.REFLECTION_SERVICE))
            for name in REFLECTION_SERVICES:
                self.services[name] = {METHOD: Handler(self._reflecting(answering), True)}

    @property
    def health(self) -> dict[str, Handler]:
        """Of grpc.health.v1, which needs no token."""
        return {
            "Check": self._unary(self._plain(protocol.HealthCheckRequest, self._health.check)),
            "List": self._unary(self._plain(protocol.HealthListRequest, self._health.list)),
            "Watch": Handler(self._watch, True),
        }

    def by_path(self) -> dict[bytes, Handler]:
        return {
            f"/{service}/{name}".encode(): handler
            for service, methods in self.services.items()
            for name, handler in methods.items()
        }

    async def end_streams(self, seconds: float) -> None:
        """The server is going: read no stream any further, and wait for each to end when what it sent was answered."""
        for stream in self._streams:
            stream.end()
        until = time.monotonic() + seconds
        while self._streams and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _allow(self, context: Any, role: Role) -> None:
        """Raises Unauthenticated or PermissionDenied for a call that its token does not allow, and counts it."""
        if self._tokens is not None:
            refusal = self._tokens.refusal(context.invocation_metadata() or (), role)
            if refusal is not None:
                self._metrics.refused(refusal.status.name, refusal.reason)
                raise refusal

    def _unary(self, method: Callable[[bytes, Any], Awaitable[bytes]], role: Role | None = None) -> Handler:
        """`role`: what the caller's token must have; None: nothing."""

        async def handle(_iterator: Any, context: Any) -> bytes:
            try:
                if role is not None:
                    self._allow(context, role)
                return await method(await self._first(context), context)
            except RequestError as error:
                await self._abort(context, error)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception:
                logger.exception("a call failed unexpectedly")
                await self._abort(context, RunFailed("internal error; the server's log has the details"))
            raise AssertionError("abort returned")

        return Handler(handle, False)

    async def _first(self, context: Any) -> bytes:
        """A call's message. Raises InvalidRequest where there is none, or none in time."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
                message = await context.read()
        except TimeoutError:
            raise InvalidRequest(f"no message within {FIRST_MESSAGE_SECONDS:g} s") from None
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call carried no message")
        found: bytes = message
        return found

    async def _infer(self, message: bytes, context: Any) -> bytes:
        timings = any(key == TIMINGS_KEY and value != "0" for key, value in context.invocation_metadata() or ())
        arrived = time.monotonic()
        future = self._door.submit(message, context.time_remaining(), timings)
        try:
            answer, timing = await future
        finally:
            self._door.abandon(future)
        if isinstance(answer, RequestError):
            raise answer
        if timings and timing is not None:
            context.set_trailing_metadata(timing.trailers(arrived))
        return answer

    @staticmethod
    def _plain(kind: protocol.MessageClass, method: Callable[[Any], Any]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        """A method from message to message, or a coroutine of one, as one from bytes to bytes."""

        async def handle(message: bytes, _context: Any) -> bytes:
            found = method(_parse(kind, message))
            response: bytes = (await found if inspect.isawaitable(found) else found).SerializeToString()
            return response

        return handle

    async def _watch(self, _iterator: Any, context: Any) -> None:
        try:
            request = _parse(protocol.HealthCheckRequest, await self._first(context))
        except RequestError as error:
            await self._abort(context, error)
            return
        async for response in self._health.watch(request):
            await context.write(response.SerializeToString())

    async def _stream(self, _iterator: Any, context: Any) -> None:
        try:
            self._allow(context, Role.INFER)
        except RequestError as error:
            await self._abort(context, error)
        stream = Stream(self._door, context, self._abort)
        self._streams.add(stream)
        try:
            await stream.serve()
        finally:
            self._streams.discard(stream)

    def _reflecting(self, reflection: Reflection) -> Callable[[Any, Any], Awaitable[None]]:
        async def handle(_iterator: Any, context: Any) -> None:
            try:
                self._allow(context, Role.INFER)
                while (message := await context.read()) is not grpc.aio.EOF:
                    answer = reflection.answer(_parse(protocol.ServerReflectionRequest, message))
                    await context.write(answer.SerializeToString())
            except RequestError as error:
                await self._abort(context, error)

        return handle

    @staticmethod
    async def _abort(context: Any, error: RequestError) -> None:
        code, text, trailers = status_of(error)
        await context.abort(CODES[code], text, tuple(trailers or ()))


def _parse(kind: protocol.MessageClass, message: bytes) -> Any:
    request = kind()
    try:
        request.ParseFromString(message)
    except (DecodeError, RuntimeError):
        raise InvalidRequest(f"the message is not a {kind.DESCRIPTOR.name}") from None
    return request
