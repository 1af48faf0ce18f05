"""The calls of one client's HTTP/2 connection and what is sent to them: responses, statuses, window credit. No I/O.

What a client's windows do not let out waits in libnghttp2's queues; `data_to_send` gives out what may leave.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Final, ParamSpec, Protocol

from ngh2 import Connection as Engine
from ngh2.exceptions import NGH2Error

from forwardpass.transport.http2 import response_fields
from forwardpass.transport.http2.grpc_framing import MESSAGE_STRUCT
from forwardpass.transport.http2.request_head import RequestHead
from forwardpass.transport.http2.response_fields import OPENING, SUCCESS, Fields
from forwardpass.transport.interface import Metadata, PendingRequest

P = ParamSpec("P")

STREAM_WINDOW: Final = 1 << 20  # bytes of one call that a client may have on their way
MESSAGE_OVERHEAD: Final = 256  # bytes that a message which waits counts for beside its own
UNREAD_AGES: Final = 1  # looks at a call that is answered, for which its client may leave it unfinished
COPY_BELOW: Final = 1 << 14  # bytes: below, a message and its prefix are joined rather than queued one by one

# HTTP/2 error codes (RFC 9113, 7).
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, CANCEL = 0x0, 0x1, 0x7, 0x8


class ReceiveBudget:
    """Bytes of messages that are incomplete, or complete and unread, over all connections. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, more: int) -> None:
        with self._lock:
            self.nbytes += more


class StreamListener(Protocol):
    """Gets the events of a call that is not ModelInfer. Called with the connection's lock held: none of it may block,
    send, or take that lock."""

    def message(self, data: bytes, due: int) -> None:
        """`due`: what to pass to `SendSide.consumed` once the message need not be kept any more."""

    def half_closed(self) -> None: ...
    def cancelled(self) -> None: ...
    def writable(self) -> None:
        """All that was sent has left."""


class ServerStream:
    """One call, from its headers to its status."""

    # Most calls never have anything but these.
    plain = False  # ModelInfer, of which nothing has come yet but its headers
    listener: StreamListener | None = None  # None: ModelInfer, or a call that is refused
    request: PendingRequest[ServerStream] | None = None  # once it is queued
    ended = False  # the client has sent everything
    refused = False  # it will be answered with an error, whatever else comes
    message: bytes | None = None  # of ModelInfer, where it came in pieces
    parts: bytearray | None = None  # of messages that are not complete
    held = 0  # what it counts for in the receive budget
    age = 0  # how often `Connection.expire_stalled` saw it wait
    queued = 0  # bytes of its response that were waiting when it was looked at last
    unacknowledged = 0  # bytes received and not yet returned to the client's window
    due = 0  # of these, to be returned now; below 0: so many were returned in advance
    opened = False  # the headers of its response were sent
    finished = False  # its status was sent, maybe behind what still waits
    trailing = False  # its status was sent when all of its messages had left
    stopped = False  # its client is to send no more of it, once the status has left

    def __init__(self, out: SendSide, number: int, head: RequestHead) -> None:
        self.out = out
        self.number = number
        self.head = head


class SendSide:
    """Calls under way and what leaves for them. Methods are called with `lock` held, by any thread.

    - A call is in `streams` from its headers until its status was queued, or its client gave it up.
    - What is sent to a call that is not there goes nowhere.
    - What was queued leaves with `flush`; `respond` and `send` flush by themselves.
    """

    def __init__(
        self, engine: Engine, transmit: Callable[[SendSide], None], budget: ReceiveBudget, owner: object = None
    ) -> None:
        """`transmit`: sends what `data_to_send` gives, as far as the socket takes it. `owner`: of the socket."""
        self.lock = threading.Lock()
        self.owner = owner
        self.streams: dict[int, ServerStream] = {}  # by their numbers; only the receiving thread adds to it
        self.listeners = 0  # opened and not yet wound up
        self._engine = engine
        self._transmit = transmit
        self._budget = budget
        self._fresh: list[tuple[ServerStream, bytes, Metadata]] = []  # answered since the last `flush`
        self._blocked: dict[int, ServerStream] = {}  # something of their response waits for the client's window
        self._unread: dict[int, ServerStream] = {}  # finished, though their client has not sent everything

    def data_to_send(self, most: int) -> bytes:
        """The next bytes for the socket, at most so many."""
        try:
            return self._engine.data_to_send(most)
        except NGH2Error:  # the connection failed, and its owner learns of it where it receives
            return b""

    @property
    def queued(self) -> int:
        """Bytes of responses that wait for the client's windows, or for the socket."""
        return self._engine.queued_body_size()

    @property
    def waits(self) -> bool:
        """Whether a call's response, or its end, waits for something."""
        return bool(self._blocked or self._unread)

    # -- responses ----------------------------------------------------------------------------------------------------

    def respond(self, responses: Sequence[tuple[ServerStream, bytes, Metadata]], hold: bool = False) -> None:
        """Answer calls of ModelInfer, with trailing metadata. What is gone is passed over.

        `hold`: more follows at once; the next `flush` transmits all of it.
        """
        engine, streams = self._engine, self.streams
        open_response, send_data, close = engine.send_response, engine.send_data, engine.send_trailers
        for stream, message, metadata in responses:
            number = stream.number
            if streams.pop(number, None) is None:
                continue
            size = len(message)
            prefix = b"\0" + size.to_bytes(4, "big")
            try:
                open_response(number, OPENING)
                if size < COPY_BELOW:
                    send_data(number, prefix + message)
                else:
                    send_data(number, prefix)
                    send_data(number, message)
                close(number, response_fields.success(metadata) if metadata else SUCCESS)
            except NGH2Error:  # the engine has ended it; the event that says so is on its way
                continue
            stream.finished = True
            if not stream.ended:
                self._unread[number] = stream
        self._fresh += responses
        if not hold:
            self.flush()

    def send(self, stream: ServerStream, message: bytes) -> bool:
        """A message of a response. Returns whether all has left; else the call's listener learns when it has."""
        if self.streams.get(stream.number) is not stream:
            return True
        try:
            self._open(stream)
            self._engine.send_data(stream.number, MESSAGE_STRUCT.pack(0, len(message)) + message)
        except NGH2Error:
            return True
        self._transmit(self)
        return not self._note_blocked(stream)

    def finish(self, stream: ServerStream, metadata: Metadata = (), message: bytes | None = None) -> None:
        """The successful end of a call, with its last message if there is one."""
        self._end(stream, response_fields.success(metadata), message)

    def fail(self, stream: ServerStream, code: int, text: str, metadata: Metadata | None = None) -> None:
        """The end of a call that failed. What was sent before it still leaves first."""
        self._end(stream, response_fields.failure(code, text, metadata or ()))

    def refuse_http(self, stream: ServerStream, status: int) -> None:
        """HTTP's own refusal, of a request that is no gRPC call."""
        if self.streams.get(stream.number) is stream:
            attempt(self._engine.send_response, stream.number, response_fields.http_failure(status), end_stream=True)
            self._finished(stream)

    def reset(self, stream: ServerStream, code: int) -> None:
        """End a call without a status."""
        self.forget(stream)
        attempt(self._engine.reset_stream, stream.number, code)

    def flush(self) -> None:
        """Transmit what was queued, and see what of the responses that waited has left."""
        self._transmit(self)
        if self._fresh:
            if self._engine.queued_body_size():
                for stream, _, _ in self._fresh:
                    self._note_blocked(stream)
            self._fresh.clear()
        if self._blocked or self._unread:
            self._look_at_blocked()

    # -- the client's flow-control window -----------------------------------------------------------------------------

    def returned(self, stream: ServerStream, due: int) -> None:
        """Bytes of a call need not be kept: the client may send as many again. Below 0: so many come off the next."""
        stream.due += due
        if stream.due > 0:
            stream.unacknowledged -= stream.due
            attempt(self._engine.acknowledge_received_data, stream.due, stream.number)
            stream.due = 0

    def consumed(self, stream: ServerStream, due: int) -> None:
        """A message need not be kept any more. `flush` lets the client know."""
        if self.streams.get(stream.number) is stream:
            self.hold(stream, stream.held - due - MESSAGE_OVERHEAD)
            self.returned(stream, due)

    def hold(self, stream: ServerStream, nbytes: int) -> None:
        """Set what a call counts for in the receive budget."""
        if nbytes != stream.held:
            self._budget.add(nbytes - stream.held)
            stream.held = nbytes

    # -- ends ---------------------------------------------------------------------------------------------------------

    def forget(self, stream: ServerStream) -> None:
        """Take a call out of those under way."""
        self.streams.pop(stream.number, None)
        self.hold(stream, 0)
        if stream.unacknowledged:  # what nobody will read must not narrow the connection's window for ever
            attempt(self._engine.acknowledge_received_data, stream.unacknowledged, stream.number)
            stream.unacknowledged = 0

    def stop(self, number: int) -> None:
        """More comes of a call that is answered: with the next `flush` its client is asked to send no more.

        Not with the answer: most clients end the call by themselves, and nginx fails the next call on a connection
        where a frame comes for the last one.
        """
        stream = self._unread.get(number)
        if stream is not None:
            stream.stopped = True

    def stream_closed(self, number: int) -> ServerStream | None:
        """The engine has ended a stream. Returns the call if it was under way: its client gave it up."""
        self._blocked.pop(number, None)
        self._unread.pop(number, None)
        stream = self.streams.get(number)
        if stream is not None:
            self.forget(stream)
        return stream

    def expire_blocked(self, most: int) -> list[ServerStream]:
        """Give up on responses of which nothing has left for so many calls of this; the calls that had not finished."""
        self._look_at_blocked()
        for number, stream in self._unread.items():
            if number not in self._blocked:
                stream.age += 1
                stream.stopped = stream.stopped or stream.age > UNREAD_AGES
        expired = []
        for number, stream in list(self._blocked.items()):
            stream.age += 1
            if stream.age > most:
                del self._blocked[number]
                self._unread.pop(number, None)
                self.reset(stream, CANCEL)
                if not stream.finished:
                    expired.append(stream)
        return expired

    def is_blocked(self, stream: ServerStream) -> bool:
        return stream.number in self._blocked

    def lose(self) -> list[ServerStream]:
        """The connection is no more; the calls that were under way."""
        lost = list(self.streams.values())
        for stream in lost:
            self.forget(stream)
        self._fresh.clear()
        self._blocked.clear()
        self._unread.clear()
        return lost

    def _open(self, stream: ServerStream) -> None:
        if not stream.opened:
            stream.opened = True
            self._engine.send_response(stream.number, OPENING)

    def _end(self, stream: ServerStream, trailers: Fields, message: bytes | None = None) -> None:
        if self.streams.get(stream.number) is not stream:
            return
        try:
            if stream.opened or message is not None:
                self._open(stream)
                if message is not None:
                    self._engine.send_data(stream.number, MESSAGE_STRUCT.pack(0, len(message)) + message)
                stream.trailing = not self._engine.queued_body_size(stream.number)
                self._engine.send_trailers(stream.number, trailers)
            else:
                self._engine.send_response(stream.number, OPENING + trailers, end_stream=True)
        except NGH2Error:  # as in `respond`
            pass
        self._finished(stream)

    def _finished(self, stream: ServerStream) -> None:
        self.forget(stream)
        stream.finished = True
        self._note_blocked(stream)
        if not stream.ended:
            self._unread[stream.number] = stream

    # -- responses that wait ------------------------------------------------------------------------------------------

    def _waiting(self, stream: ServerStream) -> int:
        """Bytes of a response that wait for a window; 1 for a status that does, with none before it.

        HTTP/2 lets a status pass at any time; libnghttp2 has it end a body, which waits for a window above 0.
        """
        engine, number = self._engine, stream.number
        queued = engine.queued_body_size(number)
        if queued or not stream.trailing:
            return queued
        try:
            return int(min(engine.stream_remote_window_size(number), engine.remote_window_size) <= 0)
        except NGH2Error:  # it has left
            return 0

    def _note_blocked(self, stream: ServerStream) -> bool:
        queued = self._waiting(stream)
        if queued:
            stream.queued, stream.age = queued, 0
            self._blocked[stream.number] = stream
        return bool(queued)

    def _look_at_blocked(self) -> None:
        for number, stream in list(self._blocked.items()):
            queued = self._waiting(stream)
            if not queued:
                del self._blocked[number]
                if stream.listener is not None and not stream.finished:
                    stream.listener.writable()
            elif queued != stream.queued:
                stream.queued, stream.age = queued, 0
        stopped = [number for number, stream in self._unread.items() if stream.stopped and number not in self._blocked]
        for number in stopped:
            del self._unread[number]
            attempt(self._engine.reset_stream, number, NO_ERROR)
        if stopped:
            self._transmit(self)


def attempt(function: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
    """Have the engine do something for a stream that may have ended, or a connection that may have failed."""
    with contextlib.suppress(NGH2Error, ValueError):
        function(*arguments, **options)
