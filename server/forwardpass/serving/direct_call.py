"""A call of the direct door on the event loop: what grpcio's asyncio server would hand to a method, over our HTTP/2.

The receiving thread passes on what came (`StreamListener`); the method reads and writes (`read`, `write`, `abort` and
the like, as grpc.aio.ServicerContext has them). A client that sends more than is read, or reads less than is sent, is
held up by the windows of its call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from forwardpass.errors import Status
from forwardpass.serving.http2_send_side import ServerStream
from forwardpass.serving.log_limit import LogLimit
from forwardpass.serving.methods import Handler

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

Post = Callable[..., None]  # (function, *arguments), to be called on the event loop


class Aborted(grpc.aio.AbortError):  # type: ignore[misc]
    """How a method ends its call with a status."""

    def __init__(self, code: int, text: str, trailers: Sequence[Any]) -> None:
        super().__init__(text)
        self.code, self.text, self.trailers = code, text, trailers


class DirectCall:
    """From its headers to its status. Made on the receiving thread; the rest of its life is on the event loop."""

    def __init__(self, call: ServerStream, handler: Handler, post: Post) -> None:
        self._call = call
        self._out = call.out
        self._handler = handler
        self._post = post
        timeout = call.head.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._messages: deque[tuple[bytes, int]] = deque()
        self._ended = False  # no more messages will come
        self._changed: asyncio.Future[None] | None = None  # what whoever reads or writes waits for
        self._drained: asyncio.Future[None] | None = None
        self._trailers: Sequence[Any] = ()
        self._task: asyncio.Task[None] | None = None
        post(self._start)

    # -- Listener: on the receiving thread ----------------------------------------------------------------------------

    def message(self, data: bytes, due: int) -> None:
        self._post(self._got, data, due)

    def half_closed(self) -> None:
        self._post(self._got, None, 0)

    def cancelled(self) -> None:
        self._post(self._cancel)

    def writable(self) -> None:
        self._post(self._wake_writer)

    # -- what they come to, on the event loop -------------------------------------------------------------------------

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._over)

    def _over(self, _: object) -> None:
        with self._out.lock:
            self._out.listeners -= 1

    def _got(self, data: bytes | None, due: int) -> None:
        if data is None:
            self._ended = True
        else:
            self._messages.append((data, due))
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _wake_writer(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def _run(self) -> None:
        code, text, trailers, answer = await self._outcome()
        with self._out.lock:
            if code:
                self._out.fail(self._call, code, text, trailers)
            else:
                self._out.finish(self._call, self._trailers, answer)
            self._out.flush()

    async def _outcome(self) -> tuple[int, str, Sequence[Any], bytes | None]:
        """What the method came to: a status, its text and trailers, and the one message of an answer."""
        limit = asyncio.timeout(self.time_remaining())
        try:
            async with limit:
                return 0, "", (), await self._handler.function(None, self)
        except Aborted as aborted:
            return aborted.code, aborted.text, aborted.trailers, None
        except asyncio.CancelledError:  # by a client that is gone, or a server that is going
            return Status.UNAVAILABLE, "the server is stopping; send this to another one", (), None
        except Exception:
            if limit.expired():
                return Status.DEADLINE_EXCEEDED, "the deadline passed", (), None
            logger.exception("a call failed unexpectedly")
            return Status.INTERNAL, "internal error; the server's log has the details", (), None

    # -- for the method -----------------------------------------------------------------------------------------------

    async def read(self) -> Any:
        """The next message; grpc.aio.EOF once the client has said all."""
        while not self._messages:
            if self._ended:
                return grpc.aio.EOF
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
        data, due = self._messages.popleft()
        if due:
            with self._out.lock:
                self._out.consumed(self._call, due)
                self._out.flush()
        return data

    async def write(self, message: bytes) -> None:
        """Send a message; returns when the client has room for the next."""
        drained = self._drained = asyncio.get_running_loop().create_future()
        with self._out.lock:
            left = self._out.send(self._call, message)
        if not left:
            await drained

    async def abort(self, code: Any, text: str = "", trailers: Sequence[Any] = ()) -> None:
        raise Aborted(code.value[0], text, trailers)

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._call.head.metadata

    def time_remaining(self) -> float | None:
        """Seconds; None: as long as it takes."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set_trailing_metadata(self, trailers: Sequence[Any]) -> None:
        self._trailers = trailers
