"""One client's HTTP/2 connection as gRPC uses it, without a socket: bytes in, calls and bytes out.

`receive` takes what arrived and leaves calls in lists; `out` makes the frames of answers. What a client can make grow
has a bound:

- A message is refused by the length it claims, before it is read; a compressed one is inflated no further than it may.
- Messages that are not complete, or not yet read, count in `Held`, over all connections, and a call has a window.
- Calls at once, bytes of metadata and headers that go on have limits; beyond them the call or the connection ends.
- An answer that the client's windows do not let out is given up when nothing of it has left for a while (`overdue`).

Belongs to one thread; `out`, with its lock, to all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from forwardpass.errors import InvalidRequest, RequestError, RunFailed, TooLarge, UnknownMethod
from forwardpass.serving import http2
from forwardpass.serving.grpc_messages import take, unpadded
from forwardpass.serving.header_blocks import OVERSIZED, Head, HeaderDecoder, HeaderError
from forwardpass.serving.http2 import ConnectionFailed
from forwardpass.serving.http2_calls import MESSAGE_OVERHEAD, STREAM_WINDOW, Call, Held, Listener, Outgoing
from forwardpass.serving.status import status_of

WINDOW: Final = 1 << 24  # bytes of all calls of a connection that may be on their way
LARGEST_FRAME: Final = 1 << 16  # that a client may send: fewer of them for a large message
BLOCK_PIECES: Final = 64  # frames that one call's headers may come in
STRAY_RESETS: Final = 1024  # of streams that were never opened, beyond one for each that could have been
HEARD: Final = b"departed"  # of a PING behind GOAWAY: its answer follows whatever was sent before that was read


class Connection:
    """The protocol of one connection. Its owner empties `arrived`, `refused` and `gone` after each `receive`."""

    def __init__(
        self,
        max_streams: int,
        max_metadata_bytes: int,
        max_message_bytes: int,
        held: Held,
        infer_path: bytes,
        open_call: Callable[[Call], Listener | None],
        write: Callable[[Outgoing, bytes], None],
        owner: Any = None,
    ) -> None:
        """`open_call`: who hears of a call of another path; None: nobody. `write`: where frames go."""
        self.out = Outgoing(write, owner, held)
        self.calls = self.out.calls
        self.arrived: list[tuple[Call, bytes]] = []  # calls of ModelInfer and their messages
        self.refused: list[tuple[Call, RequestError]] = []  # calls of ModelInfer that are none
        self.gone: list[Call] = []  # that their client gave up
        self.last_stream = 0
        self.heard = False  # the client has answered the PING that says HEARD
        self.leaving = False  # no more calls are taken
        self._decoder = HeaderDecoder(max_metadata_bytes)
        self._max_streams = max_streams
        self._max_metadata = max_metadata_bytes
        self._max_message = max_message_bytes
        self._held = held
        self._infer_path = infer_path
        self._open_call = open_call
        self._left = b""  # of a frame that is not complete
        self.greeted = False  # it speaks HTTP/2
        self._block: list[bytes] | None = None  # headers that go on in further frames
        self._block_of = (0, 0)  # their flags and stream
        self._control: list[bytes] = []  # frames to go out once what arrived is read
        self._opened = False  # the client's windows have changed meanwhile
        self._said: list[bytes] = []  # the client's settings meanwhile
        self._credit = 0  # bytes that came and that the client was not told are free again
        self._strays = 0  # resets of streams that were never opened

    def greeting(self) -> bytes:
        """What the server says first."""
        return http2.settings(
            max_concurrent_streams=self._max_streams,
            initial_window_size=STREAM_WINDOW,
            max_frame_size=LARGEST_FRAME,
            max_header_list_size=self._max_metadata,
        ) + http2.window_update(0, WINDOW - http2.DEFAULT_WINDOW)

    # -- what arrives -------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take what the socket gave. Raises ConnectionFailed, after which nothing more can be received."""
        if self._left:
            data = self._left + data
        position, end = 0, len(data)
        if not self.greeted:
            if not http2.PREFACE.startswith(data[:24]):
                raise ConnectionFailed(http2.PROTOCOL_ERROR, "this is not HTTP/2")
            if end < 24:
                self._left = data
                return
            self.greeted, position = True, 24
        calls, arrived, head_of, most = self.calls, self.arrived, self._decoder.head, self._max_message
        unpack, unpack_message = http2.HEAD_STRUCT.unpack_from, http2.MESSAGE_STRUCT.unpack_from
        came = 0
        while end - position >= 9:
            word, flags, stream = unpack(data, position)
            length, kind = word >> 8, word & 0xFF
            begin = position + 9
            if begin + length > end:
                if length > LARGEST_FRAME:
                    raise ConnectionFailed(http2.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                break
            position = begin + length
            # Two kinds of frames make a call, nearly always in these forms; the rest of the loop is for them.
            if kind == 0:  # DATA
                came += length
                if flags == 1 and length >= 5 and self._block is None:
                    call = calls.get(stream)
                    if call is not None and call.plain:
                        compressed, size = unpack_message(data, begin)
                        if not compressed and size == length - 5 and size <= most:
                            call.ended, call.plain = True, False
                            arrived.append((call, data[begin + 5 : position]))
                            continue
            elif kind == 1 and flags & 0x2D == 0x04 and stream > self.last_stream and self._block is None:  # HEADERS
                try:
                    self._headers(stream & http2.LAST_STREAM, flags, head_of(data[begin:position]))
                except HeaderError as error:
                    raise ConnectionFailed(http2.COMPRESSION_ERROR, str(error)) from None
                continue
            self._other(kind, flags, stream & http2.LAST_STREAM, data[begin:position])
        self._left = data[position:] if position < end else b""
        self._credit += came
        if self._credit > WINDOW // 4:
            self._control.append(http2.window_update(0, self._credit))
            self._credit = 0
        self._leave()

    def _leave(self) -> None:
        """Send what became due while something was read. Raises ConnectionFailed."""
        if self._control or self._opened:
            control, self._control = b"".join(self._control), []
            said, self._said = self._said, []
            with self.out.lock:
                for settings in said:
                    self.out.heed(settings)
                if control:
                    self.out.write(self.out, control)
                if self._opened:
                    self._opened = False
                    self.out.pump()

    def overdue(self, for_message: int, for_answer: int) -> None:
        """Give up on calls that have waited for as many calls of this: of ModelInfer, for more of their message; of all
        kinds, for the client to take more of their answer."""
        for call in list(self.calls.values()):
            if call.unsent:
                call.age += 1
                if call.age > for_answer:
                    self._control.append(http2.reset(call.stream, http2.CANCEL))
                    self._give_up(call.stream)
            elif not call.ended and call.listener is None and not call.refused:
                call.age += 1
                if call.age > for_message:
                    self._refuse(call, InvalidRequest(f"nothing more of the message within {for_message} s"))
        self._leave()

    def lose(self) -> None:
        """The connection is no more: all its calls are gone, and what arrived goes nowhere."""
        self.arrived.clear()
        self.refused.clear()
        for stream in list(self.calls):
            self._give_up(stream)

    def _give_up(self, stream: int) -> None:
        """Nobody waits for a call any more."""
        with self.out.lock:
            call = self.calls.get(stream)
            if call is None:
                return
            listener = call.listener
            self.out.drop(call)
        self.gone.append(call)
        if listener is not None:
            listener.cancelled()

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """A frame that does not come with every call, or not in this form."""
        if self._block is not None and (kind != http2.CONTINUATION or stream != self._block_of[1]):
            raise ConnectionFailed(http2.PROTOCOL_ERROR, "headers were interrupted")
        if kind in (http2.DATA, http2.HEADERS):
            whole, shown = len(payload), unpadded(payload, flags)
            if shown is None:
                raise ConnectionFailed(http2.PROTOCOL_ERROR, "padding that is longer than its frame")
            if kind == http2.DATA:
                self._data(stream, flags, shown, whole - len(shown))
                return
            if flags & http2.HAS_PRIORITY:
                shown = shown[5:]
            self._block, self._block_of = [shown], (flags, stream)
            if flags & http2.END_HEADERS:
                self._whole_block()
        elif kind == http2.CONTINUATION:
            if self._block is None:
                raise ConnectionFailed(http2.PROTOCOL_ERROR, "CONTINUATION of nothing")
            self._block.append(payload)
            if len(self._block) > BLOCK_PIECES or sum(map(len, self._block)) > 4 * self._max_metadata:
                raise ConnectionFailed(http2.ENHANCE_YOUR_CALM, "headers without end")
            if flags & http2.END_HEADERS:
                self._whole_block()
        elif kind == http2.RST_STREAM:
            self._reset(stream, payload)
        elif kind == http2.SETTINGS:
            self._settings(flags, stream, payload)
        elif kind == http2.PING:
            if len(payload) != 8:
                raise ConnectionFailed(http2.FRAME_SIZE_ERROR, f"a PING of {len(payload)} bytes")
            if not flags & http2.ACK:
                self._control.append(http2.frame(http2.PING, http2.ACK, 0, payload))
            elif payload == HEARD:
                self.heard = True
        elif kind == http2.WINDOW_UPDATE:
            self._window_update(stream, payload)
        elif kind == http2.PUSH_PROMISE:
            raise ConnectionFailed(http2.PROTOCOL_ERROR, "a client cannot push")
        # PRIORITY means nothing here, GOAWAY is followed by the connection's end, and the unknown is to be ignored.

    def _whole_block(self) -> None:
        assert self._block is not None
        block, self._block = b"".join(self._block), None
        flags, stream = self._block_of
        try:
            if stream > self.last_stream:
                self._headers(stream, flags, self._decoder.head(block))
                return
            self._decoder.skip(block)
        except HeaderError as error:
            raise ConnectionFailed(http2.COMPRESSION_ERROR, str(error)) from None
        # A client of gRPC has no trailers, but HTTP/2 lets a call end with some.
        call = self.calls.get(stream)
        if call is not None:
            if call.ended or not flags & http2.END_STREAM:
                raise ConnectionFailed(http2.PROTOCOL_ERROR, "a call with two beginnings")
            self._half_closed(call)

    def _headers(self, stream: int, flags: int, head: Head) -> None:
        """A call begins."""
        if not stream & 1:
            raise ConnectionFailed(http2.PROTOCOL_ERROR, f"{stream} is no number for a client's stream")
        self.last_stream = stream
        if self.leaving or len(self.calls) >= self._max_streams:
            self._control.append(http2.reset(stream, http2.REFUSED_STREAM))
            return
        call = self.calls[stream] = Call(self.out, stream, head)
        if head.path == self._infer_path and head.sound:
            if flags & http2.END_STREAM:
                self._half_closed(call)
            else:
                call.plain = True
            return
        call.ended = bool(flags & http2.END_STREAM)
        if head is OVERSIZED:
            self._refuse(call, TooLarge(f"the metadata has more than {self._max_metadata} bytes"))
        elif head.http_status:
            with self.out.lock:
                self.out.end(call, http2.no_grpc(stream, head.http_status))
        elif head.problem:
            self._refuse(call, RunFailed(head.problem))
        elif self.out.listeners >= self._max_streams:
            # Calls that were reset are still being wound up.
            with self.out.lock:
                self.out.end(call, http2.reset(stream, http2.REFUSED_STREAM))
        else:
            listener = call.listener = self._open_call(call)
            if listener is None:
                path = head.path[:200].decode("utf-8", "replace")
                self._refuse(call, UnknownMethod(f"there is no method {path} here"))
            elif call.ended:
                listener.half_closed()

    def _data(self, stream: int, flags: int, payload: bytes, padding: int) -> None:
        """Some of a call's messages. Whatever is not one whole message in one frame comes here."""
        call = self.calls.get(stream)
        if call is None:
            if stream > self.last_stream or not stream:
                raise ConnectionFailed(http2.PROTOCOL_ERROR, f"DATA of stream {stream}, which was never opened")
            return  # of a call that was answered before it had said all
        if call.ended:
            raise ConnectionFailed(http2.STREAM_CLOSED, f"DATA of stream {stream}, which had ended")
        call.plain = False
        call.ended = bool(flags & http2.END_STREAM)
        call.room -= len(payload) + padding
        if call.room < 0:
            raise ConnectionFailed(http2.FLOW_CONTROL_ERROR, f"more DATA of stream {stream} than its window has")
        if call.refused:
            return
        call.age = 0
        error: RequestError | None = None
        with self.out.lock:
            if self.calls.get(stream) is call:  # it may have been answered meanwhile
                try:
                    self._messages(call, payload, padding)
                except RequestError as raised:
                    error = raised
        if error is not None:
            self._refuse(call, error)
        elif call.ended:
            self._half_closed(call)

    def _messages(self, call: Call, payload: bytes, padding: int) -> None:
        """Take what messages are complete now off a call's bytes. With the lock held.

        What belongs to one that is not complete may be sent again at once: its size bounds what is kept of it. What
        belongs to one that is counts until its listener has read it. Raises the RequestError to end the call with.
        """
        if call.parts is None:
            call.parts = bytearray()
        parts, held = call.parts, call.held
        granted = len(parts)  # of the first message, while it was not complete
        held -= granted
        parts += payload
        call.credit += padding
        while (taken := take(parts, call.head.encoding, self._max_message)) is not None:
            if call.listener is not None:
                call.credit -= granted
                held += taken.size + MESSAGE_OVERHEAD
                call.listener.message(taken.message, taken.size)
            elif call.message is not None:
                raise RunFailed("a second message on a call that takes one")
            else:
                call.message = taken.message
                call.credit += taken.size - granted
                held += len(taken.message)
            granted = 0
        call.credit += len(parts) - granted
        self.out.hold(call, held + len(parts))
        if self._held.nbytes > self._held.limit:
            have, limit = self._held.nbytes, self._held.limit
            raise TooLarge(f"messages that are incomplete or unread have {have} bytes, the limit is {limit}")
        self.out.consumed(call, 0)

    def _half_closed(self, call: Call) -> None:
        call.ended = True
        if call.refused:
            return
        listener = call.listener
        if call.parts:
            self._refuse(call, InvalidRequest("the call ended within a message"))
        elif listener is not None:
            listener.half_closed()
        elif call.message is None:
            self._refuse(call, InvalidRequest("the call carried no message"))
        else:
            with self.out.lock:
                self.out.hold(call, 0)  # from here on it counts as a request
            self.arrived.append((call, call.message))
            call.message = None

    def _refuse(self, call: Call, error: RequestError) -> None:
        """Answer a call with an error; nothing of what it still says matters."""
        call.refused, call.plain = True, False
        listener = call.listener
        with self.out.lock:
            if call.parts:
                call.parts.clear()
            call.message = None
            self.out.hold(call, 0)
            if listener is not None or isinstance(error, UnknownMethod):
                self.out.fail(call, *status_of(error))
            else:
                self.refused.append((call, error))
        if listener is not None:
            listener.cancelled()

    def _reset(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFailed(http2.FRAME_SIZE_ERROR, f"an RST_STREAM of {len(payload)} bytes")
        if not stream:
            raise ConnectionFailed(http2.PROTOCOL_ERROR, "RST_STREAM of the connection")
        if stream > self.last_stream:
            # HTTP/2 would have the connection end. gRPC's C core before 1.85 sends it for a call that is cancelled
            # before its headers have left, and the other calls of that connection are not to suffer.
            self._strays += 1
            if self._strays > STRAY_RESETS + self.last_stream // 2:
                raise ConnectionFailed(http2.ENHANCE_YOUR_CALM, f"{self._strays} resets of streams never opened")
            return
        self._give_up(stream)

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) % 6 or (flags & http2.ACK and payload):
            raise ConnectionFailed(http2.FRAME_SIZE_ERROR, "a SETTINGS that is none")
        if flags & http2.ACK:
            return
        # They hold for what is sent after the acknowledgement, and other threads send: `_leave` does both at once.
        self._said.append(payload)
        self._control.append(http2.frame(http2.SETTINGS, http2.ACK, 0))
        self._opened = True

    def _window_update(self, stream: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & http2.LAST_STREAM
        if len(payload) != 4 or not more:
            raise ConnectionFailed(http2.PROTOCOL_ERROR, "a WINDOW_UPDATE that is none")
        with self.out.lock:
            self.out.widen(stream, more)
        self._opened = True
