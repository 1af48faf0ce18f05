"""An open-loop gRPC client: sends when a schedule says so, whatever has been answered by then, and times every answer.

Why it is not grpcio: that client ends a call itself when its deadline passes, so a server that answers late is never
seen to, and it costs ten times what a request may cost here. This one speaks just enough HTTP/2 for unary calls: fixed
headers, one DATA frame a request, no header compression. An answer is OK where a message came, and right where that
message ends with the expected tensor; a refusal has trailers only. Why a call was refused is left to the server's
metrics.

Latency counts from the time a request was due, not from when it was sent: a client that falls behind is no excuse. The
deadline that a request brings along (grpc-timeout) is what is left of it when it is sent.

One thread, plain sockets, select; up to some 20,000 requests/s.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bodies import framed
from harness import METHOD, BenchmarkError

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
MAX_FRAME = 16384  # bytes, HTTP/2's default
WINDOW = 65535  # bytes that may be sent on a connection before the server grants more: HTTP/2's default
MAX_WINDOW = (1 << 31) - 1  # bytes, the most that can be granted
FRAME = struct.Struct(">BHBBI")  # length (high byte, low two), type, flags, stream

# What becomes of a request.
WAITING, OK, WRONG, REFUSED, RESET = range(5)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def header_block(authority: str, timeout_us: int | None) -> bytes:
    """The request's headers as HPACK literals that are not indexed, so that each call's stand alone."""

    def literal(name: str, value: str) -> bytes:
        if max(len(name), len(value)) > 126:
            raise ValueError(f"a header of more than 126 bytes: {name}: {value}")
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    fields = [b"\x83\x86"]  # :method POST, :scheme http, from HPACK's static table
    fields += [literal(":path", METHOD), literal(":authority", authority)]
    fields += [literal("content-type", "application/grpc"), literal("te", "trailers")]
    if timeout_us is not None:
        fields.append(literal("grpc-timeout", f"{timeout_us:08d}u"))
    return b"".join(fields)


@dataclass(frozen=True, slots=True)
class Body:
    """A request, and the raw tensor that a right answer ends with."""

    message: bytes
    expected: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry a request, in the order they were due. Times are seconds on time.monotonic's clock; nan: not ended."""

    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    ended: NDArray[np.float64]
    state: NDArray[np.int8]

    def between(self, begin: float, end: float) -> Outcome:
        """Those that were due in [begin, end)."""
        inside = (self.due >= begin) & (self.due < end)
        return Outcome(self.due[inside], self.sent[inside], self.ended[inside], self.state[inside])

    def count(self, state: int) -> int:
        return int((self.state == state).sum())

    def latencies(self) -> NDArray[np.float64]:
        """Seconds from due to answered, of the OK ones."""
        good = self.state == OK
        found: NDArray[np.float64] = self.ended[good] - self.due[good]
        return found

    def in_time(self, seconds: float) -> int:
        """How many were answered OK within `seconds` of being due."""
        return int((self.latencies() <= seconds).sum())

    def lateness(self) -> NDArray[np.float64]:
        """Seconds that the client was behind its own schedule, of what it sent."""
        found: NDArray[np.float64] = (self.sent - self.due)[~np.isnan(self.sent)]
        return found


def poisson(rate: float, seconds: float, seed: int = 0) -> NDArray[np.float64]:
    """Times in [0, seconds) at which requests are due: independent arrivals, `rate` a second."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1.0 / rate, int(rate * seconds * 1.2 + 100))
    times: NDArray[np.float64] = np.cumsum(gaps)
    return times[times < seconds]


class Connection:
    """One HTTP/2 connection with prior knowledge. Not thread-safe; its socket does not block."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 5.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.streams: dict[int, int] = {}  # stream: index of its request
        self._next = 1
        self._window = WINDOW
        self._out = bytearray()
        self._held: deque[tuple[int, bytes]] = deque()  # frames that wait for the window: (bytes of body, frames)
        self._in = bytearray()
        self._received = 0  # bytes of answers since the server was last granted room for them
        # No header table; and windows so wide that answers never wait for us.
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, MAX_WINDOW)
        self._out += b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings)
        self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW - WINDOW))

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out)

    @property
    def is_sending(self) -> bool:
        """Something that was asked for has not left yet."""
        return bool(self._out or self._held)

    def request(self, index: int, headers: bytes, body: bytes) -> None:
        """Send one call, or hold it back until the server grants room."""
        stream, self._next = self._next, self._next + 2
        self.streams[stream] = index
        frames = frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, END_STREAM, stream, body)
        if self._held or len(body) > self._window:
            self._held.append((len(body), frames))
        else:
            self._window -= len(body)
            self._out += frames

    def flush(self) -> None:
        while self._out:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            del self._out[:sent]

    def receive(self) -> list[tuple[int, int, bytes]]:
        """(index, kind, payload) for each of DATA, HEADERS that end a stream (payload empty), and RST_STREAM.

        Raises BenchmarkError where the server closes the connection.
        """
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return []
        if not data:
            raise BenchmarkError("the server closed a connection of the open-loop client")
        buffer = self._in
        buffer += data
        events: list[tuple[int, int, bytes]] = []
        at, size = 0, len(buffer)
        while size - at >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(buffer, at)
            stop = at + 9 + (high << 16) + low
            if stop > size:
                break
            payload = bytes(buffer[at + 9 : stop])
            at = stop
            if kind == DATA:
                self._received += len(payload)
                events.append((self.streams[stream], DATA, payload))
            elif kind == HEADERS:
                if flags & END_STREAM:
                    events.append((self.streams.pop(stream), HEADERS, b""))
            elif kind == RST_STREAM:
                # After its end, a stream is reset to say that the rest of a request was not wanted: nothing new.
                if stream in self.streams:
                    events.append((self.streams.pop(stream), RST_STREAM, payload))
            else:
                self._control(kind, flags, stream, payload)
        del buffer[:at]
        if self._received > MAX_WINDOW // 2:
            # The connection's window is one for all of its answers: without this the server stops after 2 GiB.
            self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received))
            self._received = 0
        return events

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._out += frame(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self._out += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += struct.unpack(">I", payload)[0]
            while self._held and self._held[0][0] <= self._window:
                size, frames = self._held.popleft()
                self._window -= size
                self._out += frames
        elif kind == GOAWAY:
            _, code = struct.unpack_from(">II", payload)
            raise BenchmarkError(f"the server sent GOAWAY {code}: {payload[8:].decode(errors='replace')}")

    def close(self) -> None:
        self.socket.close()


def run(
    address: str,
    bodies: Sequence[Body],
    times: NDArray[np.float64],
    timeout: float | None,
    patience: float,
    connections: int = 8,
) -> Outcome:
    """Send a request at each of `times` (seconds from the start of the run), bodies and connections in turn.

    `timeout`: seconds from when it is due that a request's deadline says; None: it has none. `patience`: seconds after
    the last is due that are waited for answers; then the connections are closed, and what is left stays WAITING.
    Raises BenchmarkError where the server ends a connection.
    """
    messages = [framed(body.message) for body in bodies]
    if max(map(len, messages)) > MAX_FRAME:
        raise BenchmarkError(f"a body of {max(map(len, messages))} bytes does not fit one frame of {MAX_FRAME}")
    count = len(times)
    sent = np.full(count, np.nan)
    ended = np.full(count, np.nan)
    state = np.zeros(count, np.int8)
    block = header_block(address, None)
    opened = [Connection(address) for _ in range(connections)]
    by_socket = {c.socket: c for c in opened}
    try:
        start = time.monotonic() + 0.05
        due = times + start
        schedule = due.tolist()
        give_up = schedule[-1] + patience if count else start
        next_, left = 0, count
        while left:
            now = time.monotonic()
            while next_ < count and schedule[next_] <= now:
                if timeout is not None:
                    block = header_block(address, max(1, int((schedule[next_] + timeout - now) * 1e6)))
                opened[next_ % connections].request(next_, block, messages[next_ % len(messages)])
                sent[next_] = now
                next_ += 1
                now = time.monotonic()
            for connection in opened:
                connection.flush()
            if now > give_up:
                break
            until = schedule[next_] if next_ < count else give_up
            writing = [c.socket for c in opened if c.wants_to_write]
            wait = max(0.0, until - time.monotonic())
            for ready in select.select(by_socket, writing, [], wait)[0]:
                events = by_socket[ready].receive()
                now = time.monotonic()
                for index, kind, payload in events:
                    if kind == DATA:
                        if payload:
                            right = payload.endswith(bodies[index % len(bodies)].expected)
                            state[index] = OK if right else WRONG
                        continue
                    if kind == RST_STREAM:
                        state[index] = RESET
                    elif state[index] == WAITING:
                        state[index] = REFUSED
                    ended[index] = now
                    left -= 1
    finally:
        for connection in opened:
            connection.close()
    state[np.isnan(ended)] = WAITING
    return Outcome(due, sent, ended, state)
