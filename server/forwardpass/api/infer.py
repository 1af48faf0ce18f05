"""ModelInfer for calls on the event loop: those of the grpcio transport, and those of streams on any transport.

Calls that arrive in one turn of the loop form one group for the intake, and each has a future for its response.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from forwardpass.api.infer_stream import Reply
from forwardpass.errors import RequestError
from forwardpass.inference.intake import Intake
from forwardpass.observability.access_log import Origin
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer, CallContext, Metadata, PendingRequest, ReplySink
from forwardpass.transport.memory_budget import COUNTED_FROM, Holding, Share, no_room
from forwardpass.transport.rest.call_context import RestCallContext


def origin_of_context(context: CallContext | None, method: str = "ModelInfer") -> Origin:
    """Where a call came from; `context` None: it is not known."""
    if context is None:
        return Origin()
    header = partial(_header, context.metadata)
    protocol = "http" if isinstance(context, RestCallContext) else "grpc"
    return Origin(header("traceparent"), None, header, protocol, method)


def _header(metadata: Metadata, name: str) -> str:
    """One of a call's headers; empty if there is none."""
    return next((value for key, value in metadata if key == name and isinstance(value, str)), "")


class InferCall(asyncio.Future[Reply]):
    """The future response to one message. `context`: of the call that it came by; None: not known."""

    def __init__(self, context: CallContext | None, loop: asyncio.AbstractEventLoop, method: str) -> None:
        super().__init__(loop=loop)
        self.context = context
        self.method = method
        self.holding: Holding | None = None  # of its answer, from when it is expected until `abandon`

    @property
    def share(self) -> Share:
        assert self.context is not None
        return self.context.share

    def reserve(self, nbytes: int) -> bool:
        """Keep room for an answer of `nbytes`. Returns whether there is room."""
        if self.context is None:
            return True
        if self.holding is None:
            self.holding = Holding(self.context.share)
        return self.holding.resize(nbytes)

    def held(self, answer: Answer) -> Answer:
        """The answer, now counted; an error in its place if there is no room. Of a call that is over nothing is."""
        if isinstance(answer, RequestError):
            answer.__traceback__ = None  # whose frames may hold this call, and other calls' messages
            return answer
        size = len(answer)
        return answer if size < COUNTED_FROM or self.reserve(size) else no_room(size)


class AsyncInference:
    """Everything except `deliver` is called on the event loop."""

    def __init__(self, make_intake: Callable[[ReplySink[InferCall]], Intake[InferCall]]) -> None:
        self._intake = make_intake(self)
        self._intake.resume = self._resume
        self._decoded: deque[tuple[InferCall, Callable[[], PendingRequest[InferCall] | None]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived: list[tuple[InferCall, bytes, float | None, bool]] = []
        self._requests: dict[asyncio.Future[Reply], PendingRequest[InferCall]] = {}
        self._replies: deque[tuple[InferCall, Reply]] = deque()
        self._scheduled = False  # a call of _flush is scheduled
        self._stepping = False  # a call of _step is

    def submit(
        self,
        message: bytes,
        seconds_left: float | None,
        timings: bool,
        context: CallContext | None = None,
        method: str = "ModelInfer",
    ) -> InferCall:
        """Queue one message. Returns its future response. Calls that arrive in one turn of the loop form one group.

        The caller must call `abandon` once it is done with the future, answered or not. `context`: whose message it is;
        `method`: of that call.
        """
        future = InferCall(context, self._loop, method)
        self._arrived.append((future, message, seconds_left, timings))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return future

    def abandon(self, future: asyncio.Future[Reply]) -> None:
        """The caller no longer waits for this response. If it has not arrived, its request is cancelled."""
        request = self._requests.pop(future, None)
        future.cancel()
        if isinstance(future, InferCall) and future.holding is not None:
            future.holding.release()
        if request is not None and future.cancelled():
            request.cancel()

    def origin(self, call: InferCall) -> Origin:
        """Where a call came from."""
        return origin_of_context(call.context, call.method)

    def traceparents(self, requests: Sequence[PendingRequest[InferCall]]) -> list[bytes]:
        return [self.origin(request.call).traceparent.encode("latin-1", "replace") for request in requests]

    def _flush(self) -> None:
        self._scheduled = False
        arrived, self._arrived = self._arrived, []
        intake = self._intake
        intake.begin()
        for future, message, seconds_left, timings in arrived:
            if future.done():  # cancelled before it was taken
                continue
            room = None if future.context is None else future
            request = intake.take(future, message, seconds_left, timings, room)
            if request is not None:
                self._requests[future] = request
        intake.flush()
        self._step()

    def _resume(self, call: InferCall, take: Callable[[], PendingRequest[InferCall] | None]) -> None:
        """A large message was decoded, on another thread: have the event loop take it."""
        self._decoded.append((call, take))
        with contextlib.suppress(RuntimeError):  # the loop is closed: no client waits any more
            self._loop.call_soon_threadsafe(self._take_decoded)

    def _take_decoded(self) -> None:
        intake = self._intake
        intake.begin()
        while self._decoded:
            call, take = self._decoded.popleft()
            intake.decoding -= 1
            if not call.done() and (request := take()) is not None:
                self._requests[call] = request
        intake.flush()
        self._step()

    def _step(self) -> None:
        self._stepping = False
        if self._intake.run_pending() and not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)  # after whatever has arrived meanwhile

    def deliver(
        self, requests: Sequence[PendingRequest[InferCall]], answers: Sequence[Answer], timing: BatchTiming | None
    ) -> None:
        if threading.get_ident() == self._thread:
            for request, answer in zip(requests, answers, strict=True):
                if not request.call.done():
                    request.call.set_result((request.call.held(answer), timing))
            return
        self._replies.extend((r.call, (r.call.held(a), timing)) for r, a in zip(requests, answers, strict=True))
        with contextlib.suppress(RuntimeError):  # the loop is closed: no client waits any more
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        while self._replies:
            future, reply = self._replies.popleft()
            if not future.done():
                future.set_result(reply)
            elif future.holding is not None:  # perhaps counted after it was abandoned
                future.holding.release()
