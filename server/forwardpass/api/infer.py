"""ModelInfer for calls on the event loop: those of the grpcio transport, and those of streams on any transport.

Calls that arrive in one turn of the loop form one group for the intake, and each has a future for its response.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from forwardpass.api.infer_stream import Reply
from forwardpass.inference.intake import Intake
from forwardpass.inference.request import InferenceRequest
from forwardpass.protocol.timings import BatchTiming
from forwardpass.transport.interface import Answer, PendingRequest, ReplySink

Call = asyncio.Future[Reply]


class AsyncInference:
    """Everything except `deliver` is called on the event loop."""

    def __init__(self, make_intake: Callable[[ReplySink[Call]], Intake[Call]]) -> None:
        self._intake = make_intake(self)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived: list[tuple[Call, bytes, float | None, bool]] = []
        self._requests: dict[Call, InferenceRequest[Call]] = {}
        self._replies: deque[tuple[Call, Reply]] = deque()
        self._scheduled = False  # a call of _flush is scheduled
        self._stepping = False  # a call of _step is

    def submit(self, message: bytes, seconds_left: float | None, timings: bool) -> Call:
        """Queue one message. Returns its future response. Calls that arrive in one turn of the loop form one group.

        The caller must call `abandon` once it is done with the future, answered or not.
        """
        future: Call = self._loop.create_future()
        self._arrived.append((future, message, seconds_left, timings))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return future

    def abandon(self, future: Call) -> None:
        """The caller no longer waits for this response. If it has not arrived, its request is cancelled."""
        request = self._requests.pop(future, None)
        future.cancel()
        if request is not None and future.cancelled():
            request.cancel()

    def _flush(self) -> None:
        self._scheduled = False
        arrived, self._arrived = self._arrived, []
        intake = self._intake
        intake.begin()
        for future, message, seconds_left, timings in arrived:
            if future.done():  # cancelled before it was taken
                continue
            request = intake.take(future, message, seconds_left, timings)
            if request is not None:
                self._requests[future] = request
        intake.flush()
        self._step()

    def _step(self) -> None:
        self._stepping = False
        if self._intake.run_pending() and not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)  # after whatever has arrived meanwhile

    def deliver(
        self, requests: Sequence[PendingRequest[Call]], answers: Sequence[Answer], timing: BatchTiming | None
    ) -> None:
        if threading.get_ident() == self._thread:
            for request, answer in zip(requests, answers, strict=True):
                if not request.call.done():
                    request.call.set_result((answer, timing))
            return
        self._replies.extend((r.call, (a, timing)) for r, a in zip(requests, answers, strict=True))
        with contextlib.suppress(RuntimeError):  # the loop is closed: no client waits any more
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        while self._replies:
            future, reply = self._replies.popleft()
            if not future.done():
                future.set_result(reply)
