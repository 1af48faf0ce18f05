"""One HTTP/2 connection that makes unary gRPC calls: as little of HTTP/2 as that takes, and all of that. Plaintext.

Many calls at a time; nothing waits. What a call brings back is told when it ends, by the token that it was started
with. Flow control is kept in both directions, settings and pings are acknowledged, GOAWAY and resets become statuses.

Why not grpcio's client: it makes a quarter as many calls on a core, and ends a late call by itself, so that a server
that answers late is never seen to.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from forwardpass.errors import Status
from forwardpass.loadtest.generator.headers import Reader, SentHeaders, Text

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_FRAME = struct.Struct(">HBBBI")  # length in two pieces, type, flags, stream
_SETTING = struct.Struct(">HI")
_WINDOW = 65535  # bytes: HTTP/2's default
_MAX_WINDOW = (1 << 31) - 1
_MAX_FRAME = 16384
_LAST_STREAM = (1 << 31) - 1
_READ = 1 << 18

# What RST_STREAM's code means for a call, by gRPC's table; any other is INTERNAL.
_RESETS = {7: Status.UNAVAILABLE, 8: Status.CANCELLED, 11: Status.RESOURCE_EXHAUSTED, 12: Status.PERMISSION_DENIED}
_HTTP = {400: Status.INTERNAL, 401: Status.UNAUTHENTICATED, 403: Status.PERMISSION_DENIED, 404: Status.UNIMPLEMENTED}


class Ended(NamedTuple):
    """A call that ended."""

    token: Any
    status: int
    message: Text | str | None = None
    answer: bytes = b""  # the message with its five bytes before it, where answers are kept


class Body:
    """A request's message, ready for the wire."""

    __slots__ = ("data", "head", "size")

    def __init__(self, message: bytes) -> None:
        self.data = struct.pack(">BI", 0, len(message)) + message
        self.size = len(self.data)
        self.head = _frame_head(DATA, END_STREAM, self.size) if self.size <= _MAX_FRAME else b""


@dataclass(slots=True)
class _Sending:
    """A body that did not fit at once."""

    token: Any
    block: bytes
    body: Body
    at: int = 0  # bytes of the body that are sent
    window: int = 0


def _frame_head(kind: int, flags: int, size: int) -> bytes:
    """A frame's first five bytes; the stream's number follows."""
    return _FRAME.pack(size >> 8, size & 0xFF, kind, flags, 0)[:5]


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _frame_head(kind, flags, len(payload)) + stream.to_bytes(4, "big") + payload


class ClientConnection:
    """Not thread-safe; the socket does not block.

    - Every call that was started ends exactly once: by `receive` or by `fail_all`.
    - A body is sent when the server's windows allow it; `held` says how many calls wait for that.
    - `usable` turns False when the server goes away; calls in flight may still be answered.
    """

    def __init__(self, host: str, port: int, timeout: float = 5.0, *, keep_answers: bool = False) -> None:
        """Connect. Raises OSError."""
        self.socket = socket.create_connection((host, port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.usable = True
        self.lost = False
        self._answers: dict[int, bytes] | None = {} if keep_answers else None  # by stream
        self._streams: dict[int, Any] = {}  # stream: token
        self._next = 1
        self._out: list[bytes] = []
        self._in = bytearray()
        self._reader = Reader()
        self._block: tuple[int, bytearray] | None = None  # a header block that goes on: flags, bytes
        self._window, self._stream_window, self._max_streams = _WINDOW, _WINDOW, _LAST_STREAM
        self._received = 0  # bytes of answers since the window was last granted anew
        self._waiting: deque[_Sending] = deque()  # not begun
        self._partial: dict[int, _Sending] = {}  # begun, by stream
        settings = b"".join(_SETTING.pack(*pair) for pair in ((1, 0), (2, 0), (4, _MAX_WINDOW)))
        grant = (_MAX_WINDOW - _WINDOW).to_bytes(4, "big")
        self._out += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _frame(SETTINGS, 0, 0, settings)]
        self._out.append(_frame(WINDOW_UPDATE, 0, 0, grant))

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out)

    @property
    def held(self) -> int:
        return len(self._waiting) + len(self._partial)

    @property
    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self._streams) + len(self._waiting)

    def start(self, token: Any, block: bytes, body: Body) -> None:
        """Begin a call with this header block; `flush` sends it."""
        size = body.size
        if (
            self._waiting
            or self._partial
            or size > self._window
            or size > self._stream_window
            or size > _MAX_FRAME
            or len(self._streams) >= self._max_streams
        ):
            self._waiting.append(_Sending(token, block, body))
            self._pump()
            return
        stream = self._next
        self._next = stream + 2
        self._streams[stream] = token
        self._window -= size
        number = stream.to_bytes(4, "big")
        self._out += (_frame_head(HEADERS, END_HEADERS, len(block)), number, block, body.head, number, body.data)
        if stream > _LAST_STREAM - 4:
            self.usable = False

    def flush(self) -> None:
        """Send what the socket takes."""
        if not self._out:
            return
        data = b"".join(self._out)
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose()
            sent = len(data)
        self._out = [data[sent:]] if sent < len(data) else []

    def receive(self) -> list[Ended]:
        """The calls that ended. Raises HeaderError where the server's headers cannot be read."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._lose()
            return self.fail_all(Status.UNAVAILABLE, "the server closed the connection")
        ended: list[Ended] = []
        if self._in:
            self._in += data
            data = bytes(self._in)
        at, size = 0, len(data)
        unpack, streams, read = _FRAME.unpack_from, self._streams, self._reader.read
        while size - at >= 9:
            high, low, kind, flags, stream = unpack(data, at)
            length = high << 8 | low
            begin = at + 9
            at = begin + length
            if at > size:
                at = begin - 9
                break
            if kind == DATA:
                self._received += length
                if self._answers is not None:
                    self._keep(stream, flags, data[begin:at])
                if flags & END_STREAM:
                    self._fail([stream], Status.INTERNAL, "the answer ended without a status", ended)
            elif kind == HEADERS:
                if flags & (PADDED | PRIORITY) or not flags & END_HEADERS:
                    self._long_headers(flags, stream, data[begin:at], ended)
                elif flags & END_STREAM:
                    said = read(data[begin:at])
                    token = streams.pop(stream, None)
                    if token is not None:
                        ended.append(self._status(stream, token, said))
                else:
                    # Nothing to see: but an answer that is no gRPC never gets trailers.
                    said = read(data[begin:at])
                    if said.http != 200:
                        self._not_grpc(stream, said.http, ended)
            else:
                self._control(kind, flags, stream, data[begin:at], ended)
        self._in = bytearray(data[at:])
        if self._received > _MAX_WINDOW // 2:
            self._out.append(_frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        if self._waiting or self._partial:
            self._pump()
        return ended

    def fail_all(self, status: Status, text: str) -> list[Ended]:
        """End every call here and now."""
        ended: list[Ended] = []
        self._fail(list(self._streams), status, text, ended)
        ended += [Ended(sending.token, status, text) for sending in self._waiting]
        self._waiting.clear()
        return ended

    def close(self) -> None:
        self.socket.close()

    # -- what is rare ------------------------------------------------------------------------------------------------

    def _keep(self, stream: int, flags: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        assert self._answers is not None
        if stream in self._streams:
            self._answers[stream] = self._answers.get(stream, b"") + payload

    def _status(self, stream: int, token: Any, said: SentHeaders) -> Ended:
        answer = self._answers.pop(stream, b"") if self._answers is not None else b""
        if said.grpc is None:
            if said.http not in (None, 200):
                return Ended(token, _HTTP.get(said.http, Status.UNKNOWN), f"HTTP {said.http}, no gRPC")
            return Ended(token, Status.UNKNOWN, "the answer has no grpc-status")
        if said.grpc == Status.OK and said.http is not None:
            return Ended(token, Status.INTERNAL, "OK without a message")
        return Ended(token, said.grpc if 0 <= said.grpc <= 16 else Status.UNKNOWN, said.message, answer)

    def _not_grpc(self, stream: int, http: int | None, ended: list[Ended]) -> None:
        status = _HTTP.get(http or 0, Status.UNKNOWN)
        self._fail([stream], status, f"HTTP {http}, no gRPC", ended)

    def _long_headers(self, flags: int, stream: int, payload: bytes, ended: list[Ended]) -> None:
        """A header block in several frames, or with padding."""
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if flags & PRIORITY:
            payload = payload[5:]
        if not flags & END_HEADERS:
            self._block = (flags, bytearray(payload))
            return
        self._headers(flags, stream, payload, ended)

    def _headers(self, flags: int, stream: int, payload: bytes, ended: list[Ended]) -> None:
        said = self._reader.read(payload)
        if flags & END_STREAM:
            token = self._streams.pop(stream, None)
            if token is not None:
                ended.append(self._status(stream, token, said))
        elif said.http != 200:
            self._not_grpc(stream, said.http, ended)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes, ended: list[Ended]) -> None:
        if kind == CONTINUATION and self._block is not None:
            first, block = self._block
            block += payload
            if flags & END_HEADERS:
                self._block = None
                self._headers(first, stream, bytes(block), ended)
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload) - 5, 6):
                self._set(*_SETTING.unpack_from(payload, at))
            self._out.append(_frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._out.append(_frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            grant = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += grant
            elif stream in self._partial:
                self._partial[stream].window += grant
        elif kind == RST_STREAM:
            # After its end a stream is reset to say that the rest of the request was not wanted: nothing new.
            code = int.from_bytes(payload, "big")
            self._fail([stream], _RESETS.get(code, Status.INTERNAL), f"the call was reset: HTTP/2 error {code}", ended)
        elif kind == GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            self.usable = False
            text = f"the server sent GOAWAY {code}: {payload[8:].decode(errors='replace')}"
            self._fail([s for s in self._streams if s > last], Status.UNAVAILABLE, text, ended)
            ended += [Ended(sending.token, Status.UNAVAILABLE, text) for sending in self._waiting]
            self._waiting.clear()

    def _set(self, name: int, value: int) -> None:
        if name == 3:
            self._max_streams = value
        elif name == 4:
            for sending in self._partial.values():
                sending.window += value - self._stream_window
            self._stream_window = value

    def _fail(self, streams: list[int], status: Status, text: str, ended: list[Ended]) -> None:
        for stream in streams:
            self._partial.pop(stream, None)
            token = self._streams.pop(stream, None)
            if token is not None:
                ended.append(Ended(token, status, text))

    def _lose(self) -> None:
        self.usable = False
        self.lost = True
        self._out.clear()

    def _pump(self) -> None:
        """Send of the bodies that wait what the windows allow."""
        for stream in list(self._partial):
            if not self._send_some(stream, self._partial[stream]):
                del self._partial[stream]
        while self._waiting and self._window > 0 and len(self._streams) < self._max_streams:
            sending = self._waiting.popleft()
            stream, self._next = self._next, self._next + 2
            self._streams[stream] = sending.token
            sending.window = self._stream_window
            self._out.append(_frame(HEADERS, END_HEADERS, stream, sending.block))
            if self._send_some(stream, sending):
                self._partial[stream] = sending

    def _send_some(self, stream: int, sending: _Sending) -> bool:
        """Send a part; whether something is left."""
        data, size = sending.body.data, sending.body.size
        while sending.at < size:
            room = min(self._window, sending.window, _MAX_FRAME, size - sending.at)
            if room <= 0:
                return True
            end = sending.at + room
            self._out.append(_frame(DATA, END_STREAM if end == size else 0, stream, data[sending.at : end]))
            sending.at = end
            sending.window -= room
            self._window -= room
        return False
