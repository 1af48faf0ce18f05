"""The calls of one client's HTTP/2 connection and what is sent for them: responses, statuses, window credit. No I/O.

Data that the client's windows hold back waits in libnghttp2's queues; `data_to_send` returns what may leave.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Final, ParamSpec, Protocol

from ngh2 import Connection as Engine
from ngh2.exceptions import NGH2Error

from forwardpass.protocol.status import status_of
from forwardpass.transport.http2 import response_fields
from forwardpass.transport.http2.grpc_framing import MESSAGE_STRUCT
from forwardpass.transport.http2.request_head import RequestHead
from forwardpass.transport.http2.response_fields import OPENING, SUCCESS, Fields
from forwardpass.transport.interface import Message, Metadata, PendingRequest
from forwardpass.transport.memory_budget import COUNTED_FROM, MemoryBudget, Share, no_room

P = ParamSpec("P")

STREAM_WINDOW: Final = 1 << 20  # bytes of one call that a client may have in transit
MESSAGE_OVERHEAD: Final = 256  # bytes counted for a waiting message in addition to its own
UNREAD_AGES: Final = 1  # `expire_blocked` calls for which a client may leave an answered call unfinished
COPY_BELOW: Final = 1 << 14  # bytes: a smaller message is joined with its prefix rather than queued separately

# HTTP/2 error codes (RFC 9113, 7).
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, CANCEL = 0x0, 0x1, 0x7, 0x8


class StreamListener(Protocol):
    """Receives the events of a call that is not ModelInfer. Called with the connection's lock held: no method may
    block, send, or take that lock."""

    def message(self, data: Message, due: int) -> None:
        """`due`: what to pass to `SendSide.consumed` once the message is no longer kept."""

    def half_closed(self) -> None: ...
    def cancelled(self) -> None: ...
    def writable(self) -> None:
        """Everything that was sent has left."""


class ServerStream:
    """One call, from its headers to its status."""

    # Defaults, which most calls never change.
    plain = False  # ModelInfer, of which only the headers have arrived
    listener: StreamListener | None = None  # None: ModelInfer, or a rejected call
    request: PendingRequest[ServerStream] | None = None  # once it is queued
    ended = False  # the client has sent everything
    received = 0.0  # by when its headers had been sent at the earliest, on the monotonic clock
    refused = False  # it is answered with an error, whatever else arrives
    message: Message | None = None  # of ModelInfer, if it arrived in pieces
    parts: bytearray | None = None  # of incomplete messages
    held = 0  # bytes of its messages counted in the connection's share
    promised = 0  # bytes counted there for its answer, until that is made
    age = 0  # how many calls of `Connection.expire_stalled` found it waiting
    queued = 0  # bytes of its response that were waiting at the last check
    unacknowledged = 0  # bytes received and not yet returned to the client's window
    due = 0  # of these, bytes to return now; below 0: bytes returned in advance
    opened = False  # the headers of its response were sent
    finished = False  # its status was sent, possibly behind data that still waits
    trailing = False  # its status was sent when all of its messages had left
    stopped = False  # its client must be asked to send no more, once the status has left

    def __init__(self, out: SendSide, number: int, head: RequestHead) -> None:
        self.out = out
        self.number = number
        self.head = head

    @property
    def share(self) -> Share:
        return self.out.share

    def reserve(self, nbytes: int) -> bool:
        """Keep room for an answer of `nbytes`, until it is made or the call ends. Returns whether there is room."""
        room = self.out.share.take(nbytes)
        if room:
            self.promised = nbytes
        return room


class SendSide:
    """Calls under way and what is sent for them. Methods are called with `lock` held, by any thread.

    - A call is in `streams` from its headers until its status is queued or its client cancels it.
    - What is sent to a call that is not there is dropped.
    - What is queued leaves with `flush`; `respond` and `send` flush themselves.
    """

    def __init__(
        self, engine: Engine, transmit: Callable[[SendSide], None], budget: MemoryBudget, owner: object = None
    ) -> None:
        """`transmit` sends what `data_to_send` returns, as far as the socket takes it. `owner`: of the socket."""
        self.lock = threading.Lock()
        self.first = b""  # taken from the engine already: leaves before what it has
        self.owner = owner
        self.streams: dict[int, ServerStream] = {}  # by number; only the receiving thread adds to it
        self.listeners = 0  # opened and not yet wound up
        self._engine = engine
        self._transmit = transmit
        self.share = Share(budget)  # of messages that are not read yet, and answers that have not left
        self.unsent = 0  # bytes that wait for the socket; set by `transmit`
        self._counted = 0  # bytes of answers counted in the share
        self._fresh: list[tuple[ServerStream, bytes, Metadata]] = []  # answered since the last `flush`
        self._blocked: dict[int, ServerStream] = {}  # part of their response waits for the client's window
        self._unread: dict[int, ServerStream] = {}  # finished before their client had sent everything

    def data_to_send(self, most: int) -> bytes:
        """Return the next bytes for the socket, at most `most` and what was taken from the engine before."""
        first, self.first = self.first, b""
        try:
            return first + self._engine.data_to_send(most) if first else self._engine.data_to_send(most)
        except NGH2Error:  # the connection failed; its owner gets the error when it receives
            return first

    @property
    def queued(self) -> int:
        """Bytes of responses that wait for the client's windows, or for the socket."""
        return self._engine.queued_body_size()

    @property
    def waits(self) -> bool:
        """Whether any call's response, or its end, is waiting."""
        return bool(self._blocked or self._unread)

    # -- responses ----------------------------------------------------------------------------------------------------

    def respond(self, responses: Sequence[tuple[ServerStream, bytes, Metadata]], hold: bool = False) -> None:
        """Send responses of ModelInfer calls, with trailing metadata. Calls that are gone are skipped.

        `hold`: more follows at once; the next `flush` transmits all of it.
        """
        engine, streams = self._engine, self.streams
        open_response, send_data, close = engine.send_response, engine.send_data, engine.send_trailers
        for stream, message, metadata in responses:
            number = stream.number
            size = len(message)
            if (size >= COUNTED_FROM or stream.promised) and not self._count(stream, size):
                continue
            if streams.pop(number, None) is None:
                continue
            prefix = b"\0" + size.to_bytes(4, "big")
            try:
                open_response(number, OPENING)
                if size < COPY_BELOW:
                    send_data(number, prefix + message)
                else:
                    send_data(number, prefix)
                    send_data(number, message)
                close(number, response_fields.success(metadata) if metadata else SUCCESS)
            except NGH2Error:  # the engine has ended the stream; its event is still to come
                continue
            stream.finished = True
            if not stream.ended:
                self._unread[number] = stream
        self._fresh += responses
        if not hold:
            self.flush()

    def send(self, stream: ServerStream, message: bytes) -> bool:
        """Send a response message. Returns whether all has left; if not, `StreamListener.writable` follows."""
        if self.streams.get(stream.number) is not stream:
            return True
        try:
            self._open(stream)
            self._engine.send_data(stream.number, MESSAGE_STRUCT.pack(0, len(message)) + message)
        except NGH2Error:
            return True
        self._transmit(self)
        self._recount(self._engine.queued_body_size())
        return not self._note_blocked(stream)

    def finish(self, stream: ServerStream, metadata: Metadata = (), message: bytes | None = None) -> None:
        """End a call successfully, with its last message if there is one."""
        self._end(stream, response_fields.success(metadata), message)

    def fail(self, stream: ServerStream, code: int, text: str, metadata: Metadata | None = None) -> None:
        """End a call with an error. What was sent before it still leaves first."""
        self._end(stream, response_fields.failure(code, text, metadata or ()))

    def fail_all(self, streams: Sequence[ServerStream], code: int, text: str, metadata: Metadata | None = None) -> None:
        """End several calls with one error."""
        trailers = response_fields.failure(code, text, metadata or ())
        for stream in streams:
            self._end(stream, trailers)

    def refuse_http(self, stream: ServerStream, status: int) -> None:
        """Reject a request that is not a gRPC call, with an HTTP status."""
        if self.streams.get(stream.number) is stream:
            attempt(self._engine.send_response, stream.number, response_fields.http_failure(status), end_stream=True)
            self._finished(stream)

    def reset(self, stream: ServerStream, code: int) -> None:
        """End a call without a status."""
        self.forget(stream)
        attempt(self._engine.reset_stream, stream.number, code)

    def flush(self) -> None:
        """Transmit what was queued, and check which waiting responses have left."""
        self._transmit(self)
        if self._fresh or self._counted or self.unsent:
            queued = self._engine.queued_body_size()
            if queued:
                for stream, _, _ in self._fresh:
                    self._note_blocked(stream)
            self._fresh.clear()
            self._recount(queued)
        if self._blocked or self._unread:
            self._look_at_blocked()

    # -- the memory that answers take --------------------------------------------------------------------------------

    def _count(self, stream: ServerStream, size: int) -> bool:
        """Count an answer that is to be queued; `_recount` corrects it. False: there is no room, and it has failed."""
        if self.streams.get(stream.number) is not stream:
            return False
        more, stream.promised = size - stream.promised, 0
        if more <= 0:
            self.share.add(more)
        elif not self.share.take(more):
            self.share.add(more - size)  # what was promised
            self.fail(stream, *status_of(no_room(size)))
            return False
        self._counted += size
        return True

    def _recount(self, queued: int) -> None:
        """Count what has not left: `queued` bytes behind the client's windows, and those that wait for the socket."""
        now = queued + self.unsent
        if now != self._counted:
            self.share.add(now - self._counted)
            self._counted = now

    # -- the client's flow-control window -----------------------------------------------------------------------------

    def returned(self, stream: ServerStream, due: int) -> None:
        """Return `due` bytes of a call to the client's window. Below 0: deduct them from the next return."""
        stream.due += due
        if stream.due > 0:
            stream.unacknowledged -= stream.due
            attempt(self._engine.acknowledge_received_data, stream.due, stream.number)
            stream.due = 0

    def consumed(self, stream: ServerStream, due: int) -> None:
        """Release a message that is no longer kept. `flush` sends the window credit."""
        if self.streams.get(stream.number) is stream:
            self.hold(stream, stream.held - due - MESSAGE_OVERHEAD)
            self.returned(stream, due)

    def hold(self, stream: ServerStream, nbytes: int) -> None:
        """Set the bytes counted for a call's messages."""
        if nbytes != stream.held:
            self.share.add(nbytes - stream.held)
            stream.held = nbytes

    # -- ends ---------------------------------------------------------------------------------------------------------

    def forget(self, stream: ServerStream) -> None:
        """Remove a call from those under way."""
        self.streams.pop(stream.number, None)
        self.hold(stream, 0)
        if stream.promised:
            self.share.add(-stream.promised)
            stream.promised = 0
        if stream.unacknowledged:  # bytes never to be read must not narrow the connection's window for ever
            attempt(self._engine.acknowledge_received_data, stream.unacknowledged, stream.number)
            stream.unacknowledged = 0

    def stop(self, number: int) -> None:
        """More arrives for an answered call: with the next `flush` its client is asked to send no more.

        This does not go out with the response: most clients end the call themselves, and nginx fails the next call on a
        connection where a frame arrives for the last one.
        """
        stream = self._unread.get(number)
        if stream is not None:
            stream.stopped = True

    def stream_closed(self, number: int) -> ServerStream | None:
        """The engine has ended a stream. Returns the call if it was under way: its client cancelled it."""
        self._blocked.pop(number, None)
        self._unread.pop(number, None)
        stream = self.streams.get(number)
        if stream is not None:
            self.forget(stream)
        return stream

    def expire_blocked(self, most: int) -> list[ServerStream]:
        """Reset calls whose response has not moved for `most` calls of this. Returns those that had not finished."""
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

    def lose(self, engine: Engine) -> list[ServerStream]:
        """The connection is lost: forget its calls. Returns those that were under way. `engine`: without a connection,
        in place of the one whose queues hold what was not sent."""
        lost = list(self.streams.values())
        for stream in lost:
            self.forget(stream)
        self._engine, self.unsent = engine, 0
        self._recount(0)
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
        """Bytes of a response that wait for a window; 1 if only its status does.

        HTTP/2 lets a status pass at any time; libnghttp2 sends it as the end of a body, which waits for a window above
        0.
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
    """Call the engine for a stream that may have ended, or a connection that may have failed."""
    with contextlib.suppress(NGH2Error, ValueError):
        function(*arguments, **options)
