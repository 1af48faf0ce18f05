"""One client's HTTP/2 connection as gRPC uses it, without a socket: bytes in, calls and bytes out.

libnghttp2 (through the ngh2 library) does the framing, HPACK, flow control and the limits on resets, settings and
CONTINUATION. This module does gRPC's part: calls, their messages and how they end. Everything a client can make grow is
bounded:

- A message is rejected by its claimed length, before it is read; a compressed one is inflated only up to the limit.
- Messages that are incomplete or unread, and answers that have not left, count in a `MemoryBudget` over all
  connections, of which each has a share; each call has a window.
- Concurrent calls, bytes of metadata and continued headers have limits; beyond them the call or the connection ends.
- A response that the client's windows hold back is given up when nothing of it has left for a while.

`receive`, `expire_stalled` and `lose` are for one thread and take the lock; any thread may use `out` with its lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ngh2.events import (
    DataReceived,
    Event,
    PingAcknowledged,
    RequestReceived,
    SettingsReceived,
    StreamClosed,
    TrailersReceived,
    WindowUpdated,
)
from ngh2.exceptions import NGH2Error

from forwardpass.errors import InvalidRequest, RequestError, RunFailed, TooLarge, UnknownMethod
from forwardpass.protocol.status import status_of
from forwardpass.transport.http2 import idle_resets
from forwardpass.transport.http2.backlog import MAX_CONCURRENT_STREAMS, Patience, rejections, set_limit, take_all
from forwardpass.transport.http2.engine import WINDOW, begin, ended
from forwardpass.transport.http2.grpc_framing import MESSAGE_STRUCT, take_message
from forwardpass.transport.http2.idle_resets import IdleResets
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.request_head import RequestHead
from forwardpass.transport.http2.response_fields import Fields
from forwardpass.transport.http2.send_side import (
    MESSAGE_OVERHEAD,
    NO_ERROR,
    REFUSED_STREAM,
    SendSide,
    ServerStream,
    StreamListener,
    attempt,
)
from forwardpass.transport.interface import Message
from forwardpass.transport.memory_budget import MemoryBudget

NARROW: Final = 8  # a divisor of it: a connection with less than this part left must be replaced
HEARD: Final = b"departed"  # payload of a PING: its ACK follows all that the client sent before it read our GOAWAY


class ConnectionFailed(Exception):
    """The client broke HTTP/2's rules so that not even a GOAWAY can be sent."""


class Connection:
    """One connection's protocol state. Its owner empties `arrived`, `refused` and `cancelled` after each `receive`."""

    def __init__(
        self,
        limits: ConnectionLimits,
        budget: MemoryBudget,
        infer_path: bytes,
        open_call: Callable[[ServerStream], StreamListener | None],
        transmit: Callable[[SendSide], None],
        owner: object = None,
    ) -> None:
        """`open_call` makes the listener for a call of another path, or returns None if there is no such method. It is
        called with the lock held. `transmit` sends what `out.data_to_send` returns."""
        engine = self._engine = begin(limits)
        self.out = SendSide(engine, transmit, budget, owner)
        self.streams = self.out.streams
        self.arrived: list[tuple[ServerStream, Message]] = []  # calls of ModelInfer and their messages
        self.refused: list[tuple[ServerStream, RequestError]] = []  # rejected calls, to be counted by the sink
        self.cancelled: list[ServerStream] = []  # calls whose client no longer waits
        self.received = 0.0  # since when the bytes being processed may have waited; set by the owner
        self.last_stream = 0  # the stream number of the latest call
        self.greeted = False  # the client's SETTINGS arrived: it speaks HTTP/2
        self.departing = False  # the client was asked to leave, and may have calls on their way
        self.patience = Patience(limits.max_unread_seconds)
        self.shed = 0  # calls that the engine has rejected, to be counted by the sink
        self.draining = False  # no more calls are accepted
        self.closed = False  # nothing more is received, and only what is queued is sent
        self._max_streams = limits.max_streams
        self._max_metadata = limits.max_metadata_bytes
        self._max_message = limits.max_message_bytes
        self._infer_path = infer_path
        self._open_call = open_call
        self._last_head = RequestHead(())
        self._idle_resets: IdleResets | None = IdleResets()  # until the client is known not to need it
        self._sends_no_idle_resets = False
        self._why = ""
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            TrailersReceived: self._trailers_received,
            SettingsReceived: self._settings_received,
            PingAcknowledged: self._ping_acknowledged,
        }

    def receive(self, data: bytes, unread: float = 0.0) -> None:
        """Process bytes from the socket, and transmit what they make due.

        `unread`: seconds that they may have waited. If that is too long for the connection's calls, the engine rejects
        the new ones among them, and `shed` counts them.

        A violation of HTTP/2's rules is reported to the client and sets `closed`; if not even that is possible, raises
        ConnectionFailed.
        """
        if self.closed:
            return  # while the last queued bytes leave
        if self._idle_resets is not None:
            data = self._idle_resets.filter(data)
        engine, out = self._engine, self.out
        with out.lock:
            try:
                if unread > self.patience.seconds and set_limit(engine, 0):
                    self._handle(self._shed(data))
                else:
                    engine.receive_data(data)
                    self._handle(engine.events())
                if self._idle_resets is not None and self._sends_no_idle_resets:
                    rest, self._idle_resets = self._idle_resets.kept, None
                    engine.receive_data(rest)
                if engine.want_write or out.waits or out.first:
                    out.flush()
                    self._handle(engine.events())  # of streams that the flush reset
                    self.closed = not self._wants_to_read()
                elif not engine.want_read:
                    self.closed = True
            except NGH2Error as error:
                self.closed = True
                raise ConnectionFailed(str(error)) from None

    def _shed(self, data: bytes) -> list[Any]:
        """Process bytes whose new calls come too late, which the engine rejects. Returns events. With the lock held."""
        engine = self._engine
        engine.receive_data(data)
        events = list(engine.events())
        sent = take_all(engine)
        self.shed += rejections(sent)
        self.out.first += sent
        if not set_limit(engine, self._max_streams):  # it is about to end; then the client may hear of the limit
            engine.update_settings({MAX_CONCURRENT_STREAMS: self._max_streams})
        return events

    def expire_stalled(self, for_message: int, for_response: int) -> None:
        """End calls that have waited for more than so many calls of this method: `for_message`, calls of ModelInfer for
        more of their message; `for_response`, calls of any kind for the client to take more of their response."""
        with self.out.lock:
            for stream in self.out.expire_blocked(for_response):
                self._cancel(stream)
            for stream in list(self.streams.values()):
                if stream.ended or stream.listener is not None or stream.refused or self.out.is_blocked(stream):
                    continue
                stream.age += 1
                if stream.age > for_message:
                    self._refuse(stream, InvalidRequest(f"nothing more of the message within {for_message} s"))
            self.out.flush()
            self._handle(self._engine.events())  # of streams that ended while other threads sent
            self.closed = self.closed or not self._wants_to_read()

    @property
    def narrow(self) -> bool:
        """Whether little is left of the connection's window: the client should reconnect before it is stuck.

        libnghttp2 counts the bytes of a DATA frame as they arrive, and ngh2 does not return those of a frame that it
        never delivers: one whose call was reset after a part had arrived, or contradicts its content-length.
        """
        with self.out.lock:
            try:
                return self._engine.local_window_size < WINDOW // NARROW
            except NGH2Error:  # the connection has ended
                return False

    def lose(self) -> None:
        """The connection is lost: cancel its calls, and drop what arrived."""
        with self.out.lock:
            self.closed = True
            self.arrived.clear()
            self.refused.clear()
            # Objects here refer to each other, and are freed late; what was to be sent must not stay until then.
            self._engine = ended()
            for stream in self.out.lose(self._engine):
                self._cancel(stream)

    def depart(self, why: str = "") -> None:
        """Ask the client to go elsewhere, in two steps, so that no call fails (RFC 9113, 6.8).

        The first GOAWAY asks for no more calls; those on their way are served. Once the client has acknowledged the
        PING behind it, or this is called again, a second one names the last call that is served and rejects later ones.
        """
        with self.out.lock:
            self._depart(why)
            self.out.flush()

    def _depart(self, why: str) -> None:
        if not self.departing:
            self.departing, self._why = True, why
            attempt(self._engine.send_shutdown_notice)
            self.out.flush()  # else the PING would overtake it
            attempt(self._engine.ping, HEARD)
        elif not self.draining:
            self.draining = True
            attempt(self._engine.send_goaway, NO_ERROR, debug_data=self._why.encode())

    def _wants_to_read(self) -> bool:
        try:
            return self._engine.want_read
        except NGH2Error:  # the connection has failed
            return False

    # -- events, with the lock held -----------------------------------------------------------------------------------

    def _handle(self, events: list[Any]) -> None:
        streams, acknowledge = self.streams, self._engine.acknowledge_received_data
        unpack, most = MESSAGE_STRUCT.unpack_from, self._max_message
        for event in events:
            kind = type(event)
            if kind is WindowUpdated:
                continue  # already applied by the engine
            if kind is DataReceived:
                number, data = event.stream_id, event.data
                stream = streams.get(number)
                if stream is not None and stream.plain and event.end_stream and len(data) >= 5:
                    # One whole message in one frame, as in most calls.
                    compressed, size = unpack(data)
                    if not compressed and size == len(data) - 5 and size <= most:
                        stream.ended, stream.plain = True, False
                        self.arrived.append((stream, data[5:]))
                        acknowledge(len(data), number)
                        continue
                self._data_received(number, stream, data, event.end_stream)
            elif kind is RequestReceived:
                self._request_received(event.stream_id, event.headers, event.end_stream)
            elif kind is StreamClosed:
                number = event.stream_id
                if number in streams or self.out.waits:
                    self._stream_closed(number)
            elif (handler := self._handlers.get(kind)) is not None:
                handler(event)

    def _request_received(self, number: int, fields: Fields, ended: bool) -> None:
        """Begin a call."""
        self.last_stream = number
        head = self._last_head
        if fields != head.fields:
            head = self._last_head = RequestHead(fields)
        stream = self.streams[number] = ServerStream(self.out, number, head)
        stream.received = self.received
        if self._idle_resets is not None:
            self._sends_no_idle_resets = not idle_resets.needed(head.field(b"user-agent"))
        if head.nbytes > self._max_metadata:
            stream.ended = ended
            self._refuse(stream, TooLarge(f"the metadata has more than {self._max_metadata} bytes"))
        elif head.path == self._infer_path and not head.problem and not head.http_status:
            if ended:
                self._half_closed(stream)
            else:
                stream.plain = True
        else:
            stream.ended = ended
            self._other_call(stream)

    def _other_call(self, stream: ServerStream) -> None:
        """Handle a call that is not a valid one of ModelInfer."""
        head, out = stream.head, self.out
        if head.http_status:
            out.refuse_http(stream, head.http_status)
        elif head.problem:
            self._refuse(stream, RunFailed(head.problem))
        elif out.listeners >= self._max_streams:  # calls that were reset are still being wound up
            out.reset(stream, REFUSED_STREAM)
        else:
            out.listeners += 1  # the listener itself decrements this, at its end
            listener = stream.listener = self._open_call(stream)
            if listener is None:
                out.listeners -= 1
                path = head.path[:200].decode("utf-8", "replace")
                self._refuse(stream, UnknownMethod(f"there is no method {path} here"))
            elif stream.ended:
                listener.half_closed()

    def _data_received(self, number: int, stream: ServerStream | None, data: bytes, end: bool) -> None:
        """Handle data of a call that is not one whole message in one frame."""
        if stream is None or stream.refused:  # answered before its client had sent everything
            if stream is not None:
                stream.ended = stream.ended or end
            elif not end:
                self.out.stop(number)
            attempt(self._engine.acknowledge_received_data, len(data), number)
            return
        stream.plain = False
        stream.age = 0
        stream.ended = end
        try:
            self._messages(stream, data)
        except RequestError as error:
            self._refuse(stream, error)
            return
        if end:
            self._half_closed(stream)

    def _messages(self, stream: ServerStream, payload: bytes) -> None:
        """Remove the messages that are now complete from a call's bytes.

        Bytes of an incomplete one are returned to the client's window at once: its size bounds what is kept of it.
        Those of a complete one count until its listener has read it. Raises the RequestError to end the call with.
        """
        if stream.parts is None:
            stream.parts = bytearray()
        parts, held, due = stream.parts, stream.held, 0
        returned = len(parts)  # bytes of the first message, while it was incomplete
        held -= returned
        parts += payload
        stream.unacknowledged += len(payload)  # `forget` returns these if this raises
        while (taken := take_message(parts, stream.head.encoding, self._max_message)) is not None:
            if stream.listener is not None:
                due -= returned
                held += taken.size + MESSAGE_OVERHEAD
                stream.listener.message(taken.message, taken.size)
            elif stream.message is not None:
                raise RunFailed("a second message on a call that takes one")
            else:
                stream.message = taken.message
                due += taken.size - returned
                held += len(taken.message)
            returned = 0
        self.out.returned(stream, due + len(parts) - returned)
        self.out.hold(stream, held + len(parts))
        if self.out.share.exceeded(stream.held):
            raise TooLarge(f"messages that are incomplete or unread have too many bytes: {self.out.share.describe()}")

    def _half_closed(self, stream: ServerStream) -> None:
        stream.ended = True
        if stream.refused:
            return
        listener = stream.listener
        if stream.parts:
            self._refuse(stream, InvalidRequest("the call ended within a message"))
        elif listener is not None:
            listener.half_closed()
        elif stream.message is None:
            self._refuse(stream, InvalidRequest("the call carried no message"))
        else:
            self.out.hold(stream, 0)  # from here on it counts as a request
            self.arrived.append((stream, stream.message))
            stream.message = None

    def _refuse(self, stream: ServerStream, error: RequestError) -> None:
        """Reject a call, whatever else arrives for it."""
        stream.refused, stream.plain = True, False
        listener = stream.listener
        if stream.parts:
            stream.parts.clear()
        stream.message = None
        self.out.hold(stream, 0)
        if listener is not None or isinstance(error, UnknownMethod):
            self.out.fail(stream, *status_of(error))
        else:
            self.refused.append((stream, error))
        if listener is not None:
            listener.cancelled()

    def _trailers_received(self, event: TrailersReceived) -> None:
        """End a call by trailers: gRPC clients send none, but HTTP/2 allows them."""
        stream = self.streams.get(event.stream_id)
        if stream is not None and not stream.ended:
            self._half_closed(stream)

    def _settings_received(self, _: SettingsReceived) -> None:
        self.greeted = True

    def _ping_acknowledged(self, event: PingAcknowledged) -> None:
        if event.opaque_data == HEARD and self.departing:
            self._depart(self._why)

    def _stream_closed(self, number: int) -> None:
        stream = self.out.stream_closed(number)
        if stream is not None:
            self._cancel(stream)

    def _cancel(self, stream: ServerStream) -> None:
        """Cancel a call whose client no longer waits for it."""
        self.cancelled.append(stream)
        if stream.listener is not None:
            stream.listener.cancelled()
