"""One HTTP/2 connection, in plaintext or by TLS, for load tests: many unary gRPC calls at a time, without blocking.

libnghttp2 (through the ngh2 library) does the framing, HPACK and flow control. A call's outcome is returned with the
token that it was started with. grpcio's client is not used because it makes a quarter as many calls on a core, and ends
late calls itself, which hides that a server responds late.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from ngh2 import Configuration, Role
from ngh2 import Connection as Engine
from ngh2.events import (
    DataReceived,
    GoAwayReceived,
    ResponseReceived,
    StreamClosed,
    TrailersReceived,
)
from ngh2.exceptions import NGH2Error

from forwardpass.errors import Status
from forwardpass.transport.http2.grpc_framing import MESSAGE_STRUCT

Fields = list[tuple[bytes, bytes]]

INITIAL_WINDOW_SIZE: Final = 4  # a setting number
LARGEST_WINDOW: Final = (1 << 31) - 1
LAST_STREAM: Final = (1 << 31) - 1
_READ: Final = 1 << 18
_RECORDS: Final = 16  # of TLS that are read at once, of 16 KiB at most
_BLOCKED: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_ENGINE: Final = Configuration(peer_max_concurrent_streams=LAST_STREAM)
# Status by RST_STREAM error code, from gRPC's table; any other code is INTERNAL.
_RESETS = {7: Status.UNAVAILABLE, 8: Status.CANCELLED, 11: Status.RESOURCE_EXHAUSTED, 12: Status.PERMISSION_DENIED}
_HTTP = {400: Status.INTERNAL, 401: Status.UNAUTHENTICATED, 403: Status.PERMISSION_DENIED, 404: Status.UNIMPLEMENTED}


class Ended(NamedTuple):
    """A call that ended."""

    token: Any
    status: int
    text: str = ""
    answer: bytes = b""  # the message with its five-byte prefix, if `keep_answers`


def framed(message: bytes) -> bytes:
    """A message with its gRPC prefix, as a call's body."""
    return MESSAGE_STRUCT.pack(0, len(message)) + message


def request_fields(path: str, authority: str, metadata: Sequence[tuple[str, str]] = (), scheme: str = "http") -> Fields:
    """The headers of a call, without a deadline."""
    pairs = [(":method", "POST"), (":scheme", scheme), (":path", path), (":authority", authority)]
    pairs += [("te", "trailers"), ("content-type", "application/grpc"), *metadata]
    return [(name.encode(), value.encode()) for name, value in pairs]


def timeout_field(microseconds: int) -> tuple[bytes, bytes]:
    """The header field for a deadline, clamped to at least 1 µs and just under 100 s."""
    return b"grpc-timeout", b"%du" % min(max(microseconds, 1), 99_999_999)


class ClientConnection:
    """Not thread-safe; the socket is non-blocking.

    - Every started call ends exactly once: by `receive` or by `fail_all`.
    - A body is sent when the server's windows allow it, a call begun when its stream limit does.
    - `usable` becomes False when the server goes away; calls in flight may still be answered.
    """

    def __init__(
        self,
        host: str,
        port: int,
        timeout: float = 5.0,
        *,
        keep_answers: bool = False,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        """Connect. Raises OSError. `timeout`: seconds, of the handshake too. `server_name` None: `host`."""
        self.socket = socket.create_connection((host, port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_secure = tls is not None
        if tls is not None:
            self._shake_hands(tls, server_name or host)
        self.socket.setblocking(False)
        self.usable = True
        self.lost = False
        self._keeps = keep_answers
        self._answers: dict[int, bytes] = {}  # by stream number, if kept
        self._streams: dict[int, Any] = {}  # token by stream number
        self._unstarted: list[Ended] = []  # calls that could not be begun
        self._unsent = b""
        self.wants_to_write = True  # `flush` has something to send
        self.held = 0  # calls that waited at the last `flush` for the server's flow control or stream limit
        engine = self._engine = Engine(Role.CLIENT, _ENGINE)
        engine.initiate_connection({INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
        engine.set_local_window_size(LARGEST_WINDOW)

    @property
    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self._streams) + len(self._unstarted)

    def start(self, token: Any, fields: Fields, body: bytes) -> None:
        """Begin a call with these headers and this body (see `framed`); `flush` sends it."""
        engine = self._engine
        try:
            stream = engine.send_request(fields)
            engine.send_data(stream, body, end_stream=True)
        except NGH2Error as error:  # the server has gone, or stream numbers are used up
            self.usable = False
            self._unstarted.append(Ended(token, Status.UNAVAILABLE, str(error)))
            return
        self._streams[stream] = token
        self.wants_to_write = True

    def flush(self) -> None:
        """Send as much as the socket takes."""
        engine = self._engine
        while True:
            try:
                data = self._unsent or engine.data_to_send(_READ)
            except NGH2Error:
                self._lose()
                return
            if not data:
                break
            try:
                sent = self.socket.send(data)
            except _BLOCKED:
                sent = 0
            except OSError:
                self._lose()
                return
            self._unsent = data[sent:]
            if self._unsent:
                return
        self.wants_to_write = False
        if not engine.want_read:  # it has ended: by GOAWAY with no call open, or by input that is not HTTP/2
            self._lose()
            return
        if engine.queued_body_size():
            self.held = sum(1 for stream in self._streams if engine.queued_body_size(stream))
        elif self.held:
            self.held = 0

    def receive(self) -> list[Ended]:
        """Read from the socket. Returns the calls that ended."""
        ended, self._unstarted = self._unstarted, []
        try:
            data = self._records() if self._is_secure else self.socket.recv(_READ)
        except _BLOCKED:
            return ended
        except OSError:
            data = b""
        if not data:
            self._lose()
            return ended + self.fail_all(Status.UNAVAILABLE, "the server closed the connection")
        engine = self._engine
        try:
            engine.receive_data(data)
            self._handle(engine.events(), ended)
        except NGH2Error as error:
            self._lose()
            return ended + self.fail_all(Status.UNAVAILABLE, f"the server does not speak HTTP/2: {error}")
        self.wants_to_write = self.wants_to_write or engine.want_write
        return ended

    def _handle(self, events: list[Any], ended: list[Ended]) -> None:
        streams = self._streams
        for event in events:
            kind = type(event)
            if kind is TrailersReceived:
                stream = event.stream_id
                token = streams.pop(stream, None)
                if token is not None:
                    ended.append(self._ended(stream, token, event.headers))
            elif kind is DataReceived:
                if self._keeps:
                    self._answers[event.stream_id] = self._answers.get(event.stream_id, b"") + event.data
            elif kind is ResponseReceived:
                if event.end_stream or event.headers[0][1] != b"200":
                    self._response_received(event, ended)
            elif kind is StreamClosed:
                if event.stream_id in streams:
                    self._stream_closed(event, ended)
            elif kind is GoAwayReceived:
                self.usable = False

    def fail_all(self, status: Status, text: str) -> list[Ended]:
        """End every call now, with this status. Returns all of them."""
        ended = [*self._unstarted, *(Ended(token, status, text) for token in self._streams.values())]
        self._unstarted.clear()
        self._streams.clear()
        self._answers.clear()
        return ended

    def close(self) -> None:
        self.socket.close()

    # -- TLS --------------------------------------------------------------------------------------------------------

    def _shake_hands(self, tls: ssl.SSLContext, server_name: str) -> None:
        try:
            secure = tls.wrap_socket(self.socket, server_hostname=server_name)
        except OSError:
            self.socket.close()
            raise
        if secure.selected_alpn_protocol() != "h2":
            secure.close()
            raise OSError("the server speaks TLS, and no HTTP/2 in it")
        self.socket = secure

    def _records(self) -> bytes:
        """Some of the records that have come. What is left in the socket wakes its poller again; OpenSSL keeps none."""
        records = [self.socket.recv(_READ)]
        with contextlib.suppress(*_BLOCKED):
            while records[-1] and len(records) < _RECORDS:
                records.append(self.socket.recv(_READ))
        return b"".join(records)

    # -- rare cases ---------------------------------------------------------------------------------------------------

    def _ended(self, stream: int, token: Any, fields: Sequence[tuple[bytes, bytes]]) -> Ended:
        """A call's outcome, from its trailers or from a trailers-only response."""
        answer = self._answers.pop(stream, b"") if self._keeps else b""
        status, text = None, ""
        for name, value in fields:
            if name == b"grpc-status":
                status = int(value) if value.isdigit() and int(value) <= 16 else Status.UNKNOWN
            elif name == b"grpc-message":
                text = unquote(value.decode("latin-1"))
        if status is None:
            return Ended(token, Status.UNKNOWN, "the answer has no grpc-status")
        return Ended(token, status, text, answer)

    def _response_received(self, event: ResponseReceived, ended: list[Ended]) -> None:
        """Handle a response without a message, or one that is not gRPC."""
        stream = event.stream_id
        token = self._streams.pop(stream, None)
        if token is None:
            return
        http = dict(event.headers).get(b":status", b"")
        if http != b"200":
            code = int(http) if http.isdigit() else 0
            ended.append(Ended(token, _HTTP.get(code, Status.UNKNOWN), f"HTTP {code}, no gRPC"))
            return
        outcome = self._ended(stream, token, event.headers)
        if outcome.status == Status.OK:
            outcome = Ended(token, Status.INTERNAL, "OK without a message")
        ended.append(outcome)

    def _stream_closed(self, event: StreamClosed, ended: list[Ended]) -> None:
        """Handle a call that ended without a status: reset, refused by GOAWAY, or ended with its data."""
        token = self._streams.pop(event.stream_id)
        self._answers.pop(event.stream_id, None)
        if event.error_code:
            status = _RESETS.get(event.error_code, Status.INTERNAL)
            ended.append(Ended(token, status, f"the call was reset: HTTP/2 error {event.error_code}"))
        else:
            ended.append(Ended(token, Status.INTERNAL, "the answer ended without a status"))

    def _lose(self) -> None:
        self.usable = False
        self.lost = True
        self._unsent = b""
        self.wants_to_write = False
        with contextlib.suppress(OSError):  # so that epoll reports it, and `receive` then ends the calls
            self.socket.shutdown(socket.SHUT_RDWR)
