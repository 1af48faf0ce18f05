"""A call of the direct transport on the event loop, as its handler sees it (`CallContext`).

The receiving thread passes on events (`StreamListener`); the handler reads and writes. A client that sends more than
the handler reads, or reads less than it is sent, is held back by its call's flow-control windows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from forwardpass.errors import DeadlineExceeded, Draining, RequestError, RunFailed
from forwardpass.observability.log_limit import LogLimit
from forwardpass.protocol.status import status_of
from forwardpass.transport.http2.send_side import ServerStream
from forwardpass.transport.interface import Handler, Message, Metadata
from forwardpass.transport.memory_budget import Share

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

_inflating = ThreadPoolExecutor(1, thread_name_prefix="inflate")  # one message at a time: the loop goes on meanwhile

Post = Callable[..., None]  # (function, *arguments), to be called on the event loop


class Http2CallContext:
    """One call, from its headers to its status. Created on the receiving thread, then used on the event loop."""

    def __init__(self, stream: ServerStream, handler: Handler, post: Post) -> None:
        self._stream = stream
        self._out = stream.out
        self._handler = handler
        self._post = post
        timeout = stream.head.timeout
        self._deadline = None if timeout is None else stream.received + timeout
        self._messages: deque[tuple[Message, int]] = deque()
        self._ended = False  # no more messages will come
        self._changed: asyncio.Future[None] | None = None  # awaited by `read`
        self._drained: asyncio.Future[None] | None = None  # awaited by `write`
        self._trailers: Metadata = ()
        self._task: asyncio.Task[None] | None = None
        post(self._start)

    # -- StreamListener: on the receiving thread ----------------------------------------------------------------------

    def message(self, data: Message, due: int) -> None:
        self._post(self._message_received, data, due)

    def half_closed(self) -> None:
        self._post(self._message_received, None, 0)

    def cancelled(self) -> None:
        self._post(self._cancel)

    def writable(self) -> None:
        self._post(self._wake_writer)

    # -- the same events, on the event loop ---------------------------------------------------------------------------

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._over)

    def _over(self, _: object) -> None:
        with self._out.lock:
            self._out.listeners -= 1

    def _message_received(self, data: Message | None, due: int) -> None:
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
        outcome = await self._outcome()
        with self._out.lock:
            if isinstance(outcome, RequestError):
                self._out.fail(self._stream, *status_of(outcome))
            else:
                self._out.finish(self._stream, self._trailers, outcome)
            self._out.flush()

    async def _outcome(self) -> bytes | RequestError | None:
        """Return the response's only message, None if all were written, or the error that ends the call."""
        limit = asyncio.timeout(self.seconds_left)
        try:
            async with limit:
                return await self._handler.function(self)
        except RequestError as error:
            return error
        except asyncio.CancelledError:  # the client is gone, or the server is stopping
            return Draining("the server is stopping; send this to another one")
        except Exception:
            if limit.expired():
                return DeadlineExceeded("the deadline passed")
            logger.exception("a call failed unexpectedly")
            return RunFailed("internal error; the server's log has the details")

    # -- CallContext: for the handler ---------------------------------------------------------------------------------

    @property
    def metadata(self) -> Metadata:
        return self._stream.head.metadata

    @property
    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def share(self) -> Share:
        return self._out.share

    async def read(self) -> bytes | None:
        while not self._messages:
            if self._ended:
                return None
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
        message, due = self._messages.popleft()
        if isinstance(message, bytes):
            data = message
        else:
            data = await asyncio.get_running_loop().run_in_executor(_inflating, message.inflate)
        if due:
            with self._out.lock:
                self._out.consumed(self._stream, due)
                self._out.flush()
        return data

    async def write(self, message: bytes) -> None:
        drained = self._drained = asyncio.get_running_loop().create_future()
        with self._out.lock:
            left = self._out.send(self._stream, message)
        if not left:
            await drained

    def set_trailers(self, trailers: Metadata) -> None:
        self._trailers = trailers
