"""The handler of each method, by service and name, for every transport; the direct one has its own for ModelInfer.

Messages come and go as bytes and are parsed here, so that a malformed one is INVALID_ARGUMENT and nothing internal is
exposed. Used on the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from forwardpass import protocol
from forwardpass.api.health import Health
from forwardpass.api.infer import AsyncInference, origin_of_context
from forwardpass.api.infer_stream import InferStream
from forwardpass.api.reflection import METHOD, Reflection
from forwardpass.api.reflection import SERVICES as REFLECTION_SERVICES
from forwardpass.errors import InvalidRequest, RequestError
from forwardpass.inference.accounting import log_undecoded
from forwardpass.inference.request_traces import trace_undecoded
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.protocol.field_count import check_field_count
from forwardpass.protocol.timings import TIMINGS_KEY
from forwardpass.security.tokens import Role, Tokens, role_of
from forwardpass.transport.interface import CallContext, Handler

FIRST_MESSAGE_SECONDS = 30.0  # a call that has sent no message by then is ended


class Router:
    """`handlers`: by service and method."""

    def __init__(
        self,
        methods: Mapping[str, Callable[[Any], Any]],
        health: Health,
        metrics: ModelMetrics,
        inference: AsyncInference,
        tokens: Tokens | None = None,
        reflection: bool = False,
    ) -> None:
        """`methods`: the inference service's unary methods except ModelInfer, from message to message.

        `tokens` None: anyone who reaches the port may call everything. `reflection`: offer server reflection.
        """
        self._metrics = metrics
        self._inference = inference
        self._tokens = tokens
        self._streams: set[InferStream] = set()
        of_inference = {
            "ModelInfer": self._unary(self._infer, Role.INFER),
            "ModelStreamInfer": Handler(self._stream, True),
        }
        for name, method in methods.items():
            of_inference[name] = self._unary(_plain(protocol.METHODS[name].request, method), role_of(name))
        self.handlers: dict[str, dict[str, Handler]] = {
            protocol.INFERENCE_SERVICE: of_inference,
            **health_handlers(health),
        }
        if reflection:
            answering = Reflection((*self.handlers, protocol.REFLECTION_SERVICE))
            for name in REFLECTION_SERVICES:
                self.handlers[name] = {METHOD: Handler(self._reflecting(answering), True)}

    async def end_streams(self, seconds: float) -> None:
        """Stop reading every stream, and wait up to `seconds` for each to end once its requests are answered."""
        for stream in self._streams:
            stream.end()
        until = time.monotonic() + seconds
        while self._streams and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _allow(self, context: CallContext, role: Role) -> None:
        """Raises Unauthenticated or PermissionDenied for a call that its token does not allow, and counts the call."""
        if self._tokens is not None:
            refusal = self._tokens.refusal(context.metadata, role)
            if refusal is not None:
                self._metrics.refused(refusal.status.name, refusal.reason, text=str(refusal))
                if self._metrics.access is not None:
                    log_undecoded(self._metrics.access, refusal, origin_of_context(context))
                if self._metrics.tracing is not None:
                    now = time.monotonic()
                    trace_undecoded(self._metrics.tracing, refusal, origin_of_context(context), (now, now))
                raise refusal

    def _unary(self, method: Callable[[bytes, CallContext], Awaitable[bytes]], role: Role | None = None) -> Handler:
        """`role`: the role that the caller's token must have; None: no token is needed."""

        async def handle(context: CallContext) -> bytes:
            if role is not None:
                self._allow(context, role)
            return await method(await _first(context), context)

        return Handler(handle, False)

    async def _infer(self, message: bytes, context: CallContext) -> bytes:
        timings = any(key == TIMINGS_KEY and value != "0" for key, value in context.metadata)
        arrived = time.monotonic()
        future = self._inference.submit(message, context.seconds_left, timings, context)
        try:
            answer, timing = await future
        finally:
            self._inference.abandon(future)
        if isinstance(answer, RequestError):
            raise answer
        if timings and timing is not None:
            context.set_trailers(timing.trailers(arrived))
        return answer

    async def _stream(self, context: CallContext) -> None:
        self._allow(context, Role.INFER)
        stream = InferStream(self._inference, context)
        self._streams.add(stream)
        try:
            await stream.serve()
        finally:
            self._streams.discard(stream)

    def _reflecting(self, reflection: Reflection) -> Callable[[CallContext], Awaitable[None]]:
        async def handle(context: CallContext) -> None:
            self._allow(context, Role.INFER)
            while (message := await context.read()) is not None:
                answer = reflection.answer(_parse(protocol.ServerReflectionRequest, message))
                await context.write(answer.SerializeToString())

        return handle


def health_handlers(health: Health) -> dict[str, dict[str, Handler]]:
    """The handlers of grpc.health.v1, which needs no token."""

    def unary(kind: protocol.MessageClass, method: Callable[[Any], Any]) -> Handler:
        found = _plain(kind, method)

        async def handle(context: CallContext) -> bytes:
            return await found(await _first(context), context)

        return Handler(handle, False)

    async def watch(context: CallContext) -> None:
        request = _parse(protocol.HealthCheckRequest, await _first(context))
        async for response in health.watch(request):
            await context.write(response.SerializeToString())

    return {
        protocol.HEALTH_SERVICE: {
            "Check": unary(protocol.HealthCheckRequest, health.check),
            "List": unary(protocol.HealthListRequest, health.list),
            "Watch": Handler(watch, True),
        }
    }


def _plain(
    kind: protocol.MessageClass, method: Callable[[Any], Any]
) -> Callable[[bytes, CallContext], Awaitable[bytes]]:
    """Wrap a method from message to message, or a coroutine of one, as one from bytes to bytes."""

    async def handle(message: bytes, _context: CallContext) -> bytes:
        found = method(_parse(kind, message))
        response: bytes = (await found if inspect.isawaitable(found) else found).SerializeToString()
        return response

    return handle


async def _first(context: CallContext) -> bytes:
    """A call's first message. Raises InvalidRequest if there is none, or none in time."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
            message = await context.read()
    except TimeoutError:
        raise InvalidRequest(f"no message within {FIRST_MESSAGE_SECONDS:g} s") from None
    if message is None:
        raise InvalidRequest("the call carried no message")
    return message


def _parse(kind: protocol.MessageClass, message: bytes) -> Any:
    check_field_count(message, kind)
    request = kind()
    try:
        request.ParseFromString(message)
    except (DecodeError, RuntimeError):
        raise InvalidRequest(f"the message is not a {kind.DESCRIPTOR.name}") from None
    return request
