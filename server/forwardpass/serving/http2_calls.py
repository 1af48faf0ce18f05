"""The calls of one HTTP/2 connection and what is sent to them, without a socket.

Frames are made as far as the client's windows let them; the rest is kept until they do.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from forwardpass.serving import http2
from forwardpass.serving.header_blocks import Head

STREAM_WINDOW: Final = 1 << 20  # bytes of one call that a client may have on their way
MESSAGE_OVERHEAD: Final = 256  # bytes that a message which waits counts for beside its own

Metadata = Iterable[tuple[str, str | bytes]]


class Held:
    """Bytes of messages that are not complete, or not yet read, over all connections of a door. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, more: int) -> None:
        with self._lock:
            self.nbytes += more


class Listener(Protocol):
    """Who hears of a call that is not ModelInfer. None of it may block, nor send anything."""

    def message(self, data: bytes, due: int) -> None:
        """`due`: what to tell `Outgoing.consumed` once the message need not be kept any more."""

    def half_closed(self) -> None: ...
    def cancelled(self) -> None: ...
    def writable(self) -> None:
        """All that was sent has left."""


class Call:
    """One call of a connection, from its headers to its status."""

    # Most calls never have anything but these.
    plain = False  # ModelInfer, of which nothing has come yet but its headers
    listener: Listener | None = None  # None: ModelInfer, or nobody
    request: Any = None  # once it is queued
    ended = False  # the client has said all
    refused = False  # it is going to be answered with an error, whatever else it says
    message: bytes | None = None  # of ModelInfer, where it came in pieces
    parts: bytearray | None = None  # of messages that are not complete
    held = 0  # what it counts for in `Held`
    age = 0  # how often `Connection.overdue` saw it wait
    credit = 0  # bytes that came and that the client was not told are free again
    room = STREAM_WINDOW  # bytes that the client may send
    window = 0  # bytes that the client takes, beside its initial window
    opened = False  # the headers of the answer were sent
    unsent: bytearray | None = None  # messages, or what is left of them, that wait for the client's window
    blocked = False  # its listener waits for them to leave
    last = b""  # what goes after those

    def __init__(self, out: Outgoing, stream: int, head: Head) -> None:
        self.out = out
        self.stream = stream
        self.head = head


class Outgoing:
    """Calls under way and what leaves for them. Methods are called with `lock` held, by any thread.

    - A call is in `calls` from its headers until its status was written, or its client gave it up.
    - What is sent to a call that is not there goes nowhere.
    """

    def __init__(self, write: Callable[[Outgoing, bytes], None], owner: Any, held: Held) -> None:
        """`write`: where frames go. `owner`: of the socket, for who has only a call."""
        self.lock = threading.Lock()
        self.calls: dict[int, Call] = {}  # by the number of their stream; only the receiving thread adds to it
        self.owner = owner
        self.window = http2.DEFAULT_WINDOW  # bytes that the client takes
        self.initial = http2.DEFAULT_WINDOW  # of one call
        self.frame = http2.DEFAULT_FRAME  # in one frame
        self.listeners = 0  # that were opened and have not come to their end
        self.resized = False  # the client wants a smaller header table: to be confirmed in the next block
        self.write = write
        self._held = held
        self._waiting: dict[int, Call] = {}  # calls with something unsent

    def heed(self, settings: bytes) -> None:
        """What the client's SETTINGS say. Raises ConnectionFailed."""
        for key, value in struct.iter_unpack(">HI", settings):
            if key == http2.INITIAL_WINDOW_SIZE:
                if value > http2.LARGEST_WINDOW:
                    raise http2.ConnectionFailed(http2.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                self.initial = value
            elif key == http2.MAX_FRAME_SIZE:
                if not http2.DEFAULT_FRAME <= value < 1 << 24:
                    raise http2.ConnectionFailed(http2.PROTOCOL_ERROR, f"frames of {value} bytes")
                self.frame = value
            elif key == http2.HEADER_TABLE_SIZE and value < http2.DEFAULT_TABLE:
                self.resized = True

    def widen(self, stream: int, more: int) -> None:
        """The client takes `more` bytes: of a call, or, as stream 0, of all. Raises ConnectionFailed."""
        if not stream:
            self.window += more
            window = self.window
        elif (call := self.calls.get(stream)) is not None:
            call.window += more
            window = self.initial + call.window
        else:
            return
        if window > http2.LARGEST_WINDOW:
            raise http2.ConnectionFailed(http2.FLOW_CONTROL_ERROR, f"a window of {window} bytes")

    def answer(self, answered: Sequence[tuple[Call, bytes, Metadata]]) -> None:
        """Answer calls of ModelInfer, with trailing metadata. What is gone is passed over."""
        out: list[bytes] = []
        calls, most, make = self.calls, min(self.frame, self.initial), http2.answer
        if self.resized:
            most = 0
        for call, message, metadata in answered:
            size = len(message) + 5
            if size <= most and size <= self.window and not metadata:
                if calls.pop(call.stream, None) is not None:
                    self.window -= size
                    out.append(make(call.stream, message))
                continue
            if out:
                self.write(self, b"".join(out))
                out = []
            self.send(call, message)
            self.finish(call, metadata)
        if out:
            self.write(self, b"".join(out))

    def send(self, call: Call, message: bytes) -> bool:
        """A message of an answer. Whether all has left; otherwise the call's listener is told when it has."""
        if self.calls.get(call.stream) is not call:
            return True
        self._open(call)
        if call.unsent is None:
            call.unsent = bytearray()
        call.unsent += http2.MESSAGE_STRUCT.pack(0, len(message))
        call.unsent += message
        self._waiting[call.stream] = call
        self.pump()
        call.blocked = bool(call.unsent)
        return not call.blocked

    def finish(self, call: Call, metadata: Metadata = ()) -> None:
        """The successful end of a call."""
        if self.calls.get(call.stream) is call:
            self._open(call)
            self.end(call, http2.closing(call.stream, metadata))

    def fail(self, call: Call, code: int, text: str, metadata: Metadata | None = None) -> None:
        """The end of a call that failed. What was sent before it still leaves first."""
        if self.calls.get(call.stream) is call:
            resized, self.resized = self.resized, False
            self.end(call, http2.failure(call.stream, code, text, metadata or (), call.opened, resized))

    def consumed(self, call: Call, due: int) -> None:
        """A message need not be kept any more: the client may send as much again."""
        if self.calls.get(call.stream) is not call:
            return
        call.credit += due
        if due:
            self.hold(call, call.held - due - MESSAGE_OVERHEAD)
        if call.credit > STREAM_WINDOW // 4 and not call.ended:
            self.write(self, http2.window_update(call.stream, call.credit))
            call.room += call.credit
            call.credit = 0

    def hold(self, call: Call, nbytes: int) -> None:
        """What a call counts for from here on in `Held`."""
        self._held.add(nbytes - call.held)
        call.held = nbytes

    def _open(self, call: Call) -> None:
        if not call.opened:
            call.opened = True
            resized, self.resized = self.resized, False
            self.write(self, http2.opening(call.stream, resized))

    def end(self, call: Call, frames: bytes) -> None:
        """The last frames of a call, behind what is unsent of it."""
        if self.calls.get(call.stream) is not call:
            return
        if not call.ended:  # the client is not to send the rest
            frames += http2.reset(call.stream, http2.NO_ERROR)
        if call.unsent:
            call.last = frames
        else:
            self.write(self, frames)
            self.drop(call)

    def drop(self, call: Call) -> None:
        """Forget a call."""
        self.calls.pop(call.stream, None)
        self._waiting.pop(call.stream, None)
        if call.held:
            self.hold(call, 0)

    @property
    def waiting(self) -> bool:
        """Whether an answer waits for the client's windows. To be read without the lock: a hint."""
        return bool(self._waiting)

    def pump(self) -> None:
        """Send what the windows allow of what waits for them."""
        for call in list(self._waiting.values()):
            assert call.unsent is not None
            room = min(self.window, self.initial + call.window, len(call.unsent))
            if room > 0:
                payload = bytes(memoryview(call.unsent)[:room])
                del call.unsent[:room]
                self.window -= room
                call.window -= room
                call.age = 0
                self.write(self, http2.data_frames(call.stream, payload, self.frame))
            if not call.unsent:
                self._waiting.pop(call.stream, None)
                if call.last:
                    self.write(self, call.last)
                    self.drop(call)
                elif call.blocked and call.listener is not None:
                    call.blocked = False
                    call.listener.writable()
            elif self.window <= 0:
                break
