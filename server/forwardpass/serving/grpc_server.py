"""The full door: every method, on grpcio's asyncio server. Also what the native door falls back to.

Messages come and go as bytes and are parsed here, so that a malformed one is INVALID_ARGUMENT and nothing internal
is said. Unary methods are registered as client-streaming ones, which look the same on the wire: grpcio's asyncio
server sends no status at all to a unary call that ends without a message, and would wait for ever for one that never
comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from forwardpass.errors import InvalidRequest, RequestError, RunFailed
from forwardpass.serving import protocol
from forwardpass.serving.auth import Role, Tokens, role_of
from forwardpass.serving.health import Health
from forwardpass.serving.intake import TIMINGS_KEY, Intake
from forwardpass.serving.metrics import ModelMetrics
from forwardpass.serving.reflection import METHOD, Reflection
from forwardpass.serving.reflection import SERVICES as REFLECTION_SERVICES
from forwardpass.serving.request import Request, Timing
from forwardpass.serving.service import Service
from forwardpass.serving.status import status_of
from forwardpass.serving.stream import Reply, Stream
from forwardpass.serving.worker import Answer, Worker

logger = logging.getLogger(__name__)

FIRST_MESSAGE_SECONDS = 30.0  # a call that has sent no message by then is ended
CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcServer:
    """Owns the grpcio server. Everything but `deliver` is called on the event loop."""

    def __init__(
        self,
        service: Service,
        health: Health,
        metrics: ModelMetrics,
        max_message_bytes: int,
        max_streams: int,
        max_metadata_bytes: int,
        make_intake: Callable[[GrpcServer], Intake],
        max_connection_age: float = 0.0,
        more_methods: Mapping[str, Callable[[Any], Any]] | None = None,
        tokens: Tokens | None = None,
        reflection: bool = False,
    ) -> None:
        """`more_methods`: unary methods beside those of `service`, from message to message.

        `tokens` None: whoever reaches the port may call everything. `reflection`: offer server reflection.
        """
        self._health = health
        self._metrics = metrics
        self._methods = {**service.methods, **(more_methods or {})}
        self._tokens = tokens
        self._streams: set[Stream] = set()
        self._intake = make_intake(self)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived: list[tuple[asyncio.Future[Reply], bytes, float | None, bool]] = []
        self._requests: dict[asyncio.Future[Reply], Request] = {}
        self._replies: deque[tuple[asyncio.Future[Reply], Reply]] = deque()
        self._scheduled = False  # a call of _flush is on its way
        self._stepping = False  # a call of _step is
        # gRPC adds a jitter of a tenth to the age by itself; calls under way have as long as they need.
        aging = [("grpc.max_connection_age_ms", int(max_connection_age * 1000))] if max_connection_age else []
        self._server = grpc.aio.server(
            options=[
                *aging,
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", max_streams),
                ("grpc.max_metadata_size", max_metadata_bytes),
                ("grpc.absolute_max_metadata_size", max_metadata_bytes),
                ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic silently
            ]
        )
        self._server.add_generic_rpc_handlers(self._handlers(reflection))
        self._probed: Any = None  # the server of health alone

    def listen(self, address: str, credentials: Any = None) -> int:
        """Bind before `start`; the port. Raises RuntimeError when the address is taken."""
        if credentials is not None:
            return int(self._server.add_secure_port(address, credentials))
        return int(self._server.add_insecure_port(address))

    def listen_health(self, address: str) -> int:
        """As `listen`: a port for health alone, in plaintext, for probes, which bring no certificate."""
        probed = grpc.aio.server(options=[("grpc.max_receive_message_length", 4096), ("grpc.so_reuseport", 0)])
        handler = grpc.method_handlers_generic_handler(protocol.HEALTH_SERVICE, self._health_methods())
        probed.add_generic_rpc_handlers((handler,))
        self._probed = probed
        return int(probed.add_insecure_port(address))

    async def start(self) -> None:
        await self._server.start()
        if self._probed is not None:
            await self._probed.start()

    async def stop(self, seconds: float) -> None:
        """Take no more calls, give those under way `seconds`."""
        if self._probed is not None:
            await self._probed.stop(0.0)
        for stream in self._streams:
            stream.end()
        await self._server.stop(seconds)

    # -- ModelInfer ---------------------------------------------------------------------------------------------------

    def submit(self, message: bytes, seconds_left: float | None, timings: bool) -> asyncio.Future[Reply]:
        """Queue one message; its answer to come. Calls that arrive in one turn of the loop form one group.

        Whoever is done with the future, answered or not, says so by `abandon`.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._arrived.append((future, message, seconds_left, timings))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return future

    def abandon(self, future: asyncio.Future[Reply]) -> None:
        """Nobody waits for this answer any more. If it has not come, its request is cancelled."""
        request = self._requests.pop(future, None)
        future.cancel()
        if request is not None and future.cancelled():
            worker: Worker = request.header.target
            worker.cancel(request)

    def _flush(self) -> None:
        self._scheduled = False
        arrived, self._arrived = self._arrived, []
        intake = self._intake
        intake.begin()
        for future, message, seconds_left, timings in arrived:
            if future.done():  # cancelled before it was looked at
                continue
            request = intake.take(future, message, seconds_left, timings)
            if request is not None:
                self._requests[future] = request
        intake.flush()
        self._step()

    def _step(self) -> None:
        self._stepping = False
        if self._intake.step() and not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)  # after whatever has arrived meanwhile

    def deliver(self, requests: Sequence[Request], answers: Sequence[Answer], timing: Timing | None) -> None:
        if threading.get_ident() == self._thread:
            for request, answer in zip(requests, answers, strict=True):
                if not request.call.done():
                    request.call.set_result((answer, timing))
            return
        self._replies.extend((r.call, (a, timing)) for r, a in zip(requests, answers, strict=True))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        while self._replies:
            future, reply = self._replies.popleft()
            if not future.done():
                future.set_result(reply)

    # -- from gRPC's calls to the methods
    # -------------------------------------------------------------------------------

    def _handlers(self, reflection: bool) -> tuple[Any, ...]:
        found = []
        inference: dict[str, Any] = {
            "ModelInfer": self._unary(self._infer, Role.INFER),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        for name, method in self._methods.items():
            inference[name] = self._unary(self._plain(protocol.METHODS[name].request, method), role_of(name))
        services = {protocol.INFERENCE_SERVICE: inference, protocol.HEALTH_SERVICE: self._health_methods()}
        if reflection:
            answering = Reflection((*services, protocol.REFLECTION_SERVICE))
            for name in REFLECTION_SERVICES:
                services[name] = {METHOD: grpc.stream_stream_rpc_method_handler(self._reflecting(answering))}
        for name, methods in services.items():
            found.append(grpc.method_handlers_generic_handler(name, methods))
        return tuple(found)

    def _health_methods(self) -> dict[str, Any]:
        return {
            "Check": self._unary(self._plain(protocol.HealthCheckRequest, self._health.check)),
            "List": self._unary(self._plain(protocol.HealthListRequest, self._health.list)),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }

    def _allow(self, context: Any, role: Role) -> None:
        """Raises Unauthenticated or PermissionDenied for a call that its token does not allow, and counts it."""
        if self._tokens is not None:
            refusal = self._tokens.refusal(context.invocation_metadata() or (), role)
            if refusal is not None:
                self._metrics.refused(refusal.status.name, refusal.reason)
                raise refusal

    def _unary(self, method: Callable[[bytes, Any], Awaitable[bytes]], role: Role | None = None) -> Any:
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

        return grpc.stream_unary_rpc_method_handler(handle)

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
        future = self.submit(message, context.time_remaining(), timings)
        try:
            answer, timing = await future
        finally:
            self.abandon(future)
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

    async def _watch(self, _iterator: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            request = _parse(protocol.HealthCheckRequest, await self._first(context))
        except RequestError as error:
            await self._abort(context, error)
            return
        async for response in self._health.watch(request):
            yield response.SerializeToString()

    async def _stream(self, _iterator: Any, context: Any) -> None:
        try:
            self._allow(context, Role.INFER)
        except RequestError as error:
            await self._abort(context, error)
        stream = Stream(self, context, self._abort)
        self._streams.add(stream)
        try:
            await stream.serve()
        finally:
            self._streams.discard(stream)

    def _reflecting(self, reflection: Reflection) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        async def handle(_iterator: Any, context: Any) -> AsyncIterator[bytes]:
            try:
                self._allow(context, Role.INFER)
                while (message := await context.read()) is not grpc.aio.EOF:
                    yield reflection.answer(_parse(protocol.ServerReflectionRequest, message)).SerializeToString()
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
