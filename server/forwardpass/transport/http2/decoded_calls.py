"""Calls of ModelInfer whose large messages another thread has decoded, until the receiving thread takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from forwardpass.transport.http2.send_side import ServerStream
from forwardpass.transport.interface import PendingRequest, RequestSink

Take = Callable[[], PendingRequest[ServerStream] | None]


class DecodedCalls:
    """`add` is for any thread, all else for the receiving one."""

    def __init__(self, sink: RequestSink[ServerStream], wake: Callable[[], None]) -> None:
        """`wake`: the receiving thread."""
        self._sink = sink
        self._wake = wake
        self._waiting: deque[tuple[ServerStream, Take]] = deque()
        sink.resume = self.add

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, call: ServerStream, take: Take) -> None:
        self._waiting.append((call, take))
        self._wake()

    def take(self) -> None:
        """Pass on those whose clients still wait; between the sink's `begin` and `flush`."""
        while self._waiting:
            call, take = self._waiting.popleft()
            self._sink.decoding -= 1
            if call.out.streams.get(call.number) is call:
                call.request = take()
