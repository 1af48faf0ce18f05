"""One connection without a socket: calls come out of whatever pieces their bytes came in, answers heed windows, and
what breaks the rules ends with the code that HTTP/2 has for it."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service import http2_frames as http2

from forwardpass.errors import InvalidRequest, RunFailed, TooLarge, UnknownMethod
from forwardpass.transport.http2 import connection, engine, response_fields
from forwardpass.transport.http2.connection import HEARD, Connection, ConnectionFailed
from forwardpass.transport.http2.engine import LARGEST_FRAME, WINDOW
from forwardpass.transport.http2.idle_resets import STRAY_RESETS
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.send_side import STREAM_WINDOW, SendSide, ServerStream
from forwardpass.transport.interface import Message
from forwardpass.transport.memory_budget import MemoryBudget

PATH = b"/inference.GRPCInferenceService/ModelInfer"
OTHER = b"/inference.GRPCInferenceService/ModelStreamInfer"
MOST = 100_000  # bytes of a message


class Heard:
    """A listener that keeps what it heard."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.due = 0
        self.said: list[str] = []

    def message(self, data: bytes, due: int) -> None:
        self.messages.append(data)
        self.due += due

    def half_closed(self) -> None:
        self.said.append("half closed")

    def cancelled(self) -> None:
        self.said.append("cancelled")

    def writable(self) -> None:
        self.said.append("writable")


class Frames:
    """What was written, frame by frame, with the headers read by the library hpack."""

    def __init__(self) -> None:
        self.data = b""
        self.full = False  # takes nothing, as a socket whose client does not read
        self._decoder = hpack.Decoder()

    def __call__(self, out: SendSide) -> None:
        while not self.full and (data := out.data_to_send(1 << 16)):
            self.data += data

    def take(self) -> list[tuple[int, int, int, Any]]:
        """(kind, flags, stream, payload or fields) of all that was written since."""
        found: list[tuple[int, int, int, Any]] = []
        while self.data:
            word, flags, stream = http2.HEAD_STRUCT.unpack_from(self.data)
            payload: Any = self.data[9 : 9 + (word >> 8)]
            assert len(payload) == word >> 8, "half a frame was written"
            self.data = self.data[9 + (word >> 8) :]
            if word & 0xFF == http2.HEADERS:
                payload = [(str(n), str(v)) for n, v in self._decoder.decode(payload)]
            found.append((word & 0xFF, flags, stream, payload))
        return found


class Peer:
    """A client and the connection it talks to."""

    def __init__(self, held: int = 1 << 30, max_streams: int = 100, greet: bool = True) -> None:
        self.frames = Frames()
        self.heard: list[Heard] = []
        limits = ConnectionLimits(max_streams, 4096, MOST)
        self.connection = Connection(limits, MemoryBudget(held), PATH, self._open, self.frames)
        self.encoder = hpack.Encoder()
        if greet:
            self.connection.receive(
                http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + http2.frame(http2.SETTINGS, http2.ACK, 0)
            )
            assert (http2.SETTINGS, http2.ACK, 0, b"") in self.frames.take()

    def _open(self, call: ServerStream) -> Heard | None:
        if call.head.path != OTHER:
            return None
        self.heard.append(Heard())
        return self.heard[-1]

    def headers(self, stream: int, path: bytes = PATH, *more: tuple[bytes, bytes], flags: int = 4) -> bytes:
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"test"),
            (b":path", path),
            (b"content-type", b"application/grpc"),
            *more,
        ]
        return http2.frame(http2.HEADERS, flags, stream, self.encoder.encode(fields))

    def call(self, stream: int, message: bytes = b"m", *more: tuple[bytes, bytes]) -> bytes:
        """All bytes of one call."""
        return self.headers(stream, PATH, *more) + body(stream, message)

    def send(self, *data: bytes) -> None:
        self.connection.receive(b"".join(data))

    def arrived(self) -> list[tuple[int, Message]]:
        found = [(call.number, message) for call, message in self.connection.arrived]
        self.connection.arrived.clear()
        return found

    def answer(self, call: ServerStream, message: bytes, metadata: Sequence[Any] = ()) -> None:
        with self.connection.out.lock:
            self.connection.out.respond([(call, message, metadata)])

    def fail(self, call: ServerStream, code: int, text: str, metadata: Sequence[Any] = ()) -> None:
        with self.connection.out.lock:
            self.connection.out.fail(call, code, text, metadata)
            self.connection.out.flush()

    def fails(self, code: int, *data: bytes) -> None:
        """The connection ends; what it sends last names the code, if it still can."""
        with contextlib.suppress(ConnectionFailed):
            self.send(*data)
        assert self.connection.closed
        goaways = [payload for kind, _, _, payload in self.frames.take() if kind == http2.GOAWAY]
        assert [int.from_bytes(payload[4:8], "big") for payload in goaways] in ([code], [])


def updates(peer: Peer, stream: int) -> int:
    """The bytes that the client may send again, of a call or, as stream 0, in all."""
    return sum(int.from_bytes(f[3], "big") for f in peer.frames.take() if f[0] == 8 and f[2] == stream)


def prefixed(message: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def body(stream: int, message: bytes, flags: int = 1) -> bytes:
    return http2.frame(http2.DATA, flags, stream, prefixed(message))


def settings_of(**values: int) -> bytes:
    return http2.settings(**values)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3), st.booleans()), min_size=1, max_size=8),
    st.lists(st.integers(1, 400), max_size=40),
)
def test_calls_come_out_whatever_the_pieces(calls: list[tuple[bytes, int, bool]], cuts: list[int]) -> None:
    """Messages split over frames, frames padded, bytes cut anywhere: the same calls in the same order."""
    peer = Peer()
    data = b""
    for i, (message, pieces, padded) in enumerate(calls):
        stream, whole = 2 * i + 1, prefixed(message)
        data += peer.headers(stream)
        step = max(1, len(whole) // (pieces + 1))
        parts = [whole[j : j + step] for j in range(0, len(whole), step)]
        for part in parts:
            payload = bytes([3]) + part + b"\0\0\0" if padded else part
            data += http2.frame(http2.DATA, http2.PADDED if padded else 0, stream, payload)
        data += http2.frame(http2.DATA, http2.END_STREAM, stream)
    found: list[tuple[int, bytes]] = []
    for cut in [*cuts, len(data)]:
        peer.send(data[:cut])
        data = data[cut:]
        found += peer.arrived()
    assert found == [(2 * i + 1, message) for i, (message, _, _) in enumerate(calls)]
    assert peer.connection.out.share.nbytes == 0


def test_a_call_and_its_answer() -> None:
    peer = Peer()
    peer.send(peer.call(1, b"question", (b"x-a", b"1")))
    ((call, message),) = peer.connection.arrived
    assert message == b"question" and call.head.metadata == (("x-a", "1"),)
    peer.answer(call, b"answer")
    opening, data, closing = peer.frames.take()
    assert opening == (1, 4, 1, [(":status", "200"), ("content-type", "application/grpc")])
    assert data == (0, 0, 1, prefixed(b"answer"))
    assert closing == (1, 5, 1, [("grpc-status", "0")])
    assert not peer.connection.streams
    peer.answer(call, b"again")
    assert peer.frames.take() == []


def test_trailing_metadata_goes_along() -> None:
    peer = Peer()
    peer.send(peer.call(1))
    peer.answer(peer.connection.arrived[0][0], b"a", [("x-us", "12"), ("x-bin", b"\0\xff"), ("x-long", "v" * 300)])
    closing = peer.frames.take()[-1]
    assert closing[3] == [("grpc-status", "0"), ("x-us", "12"), ("x-bin", "AP8"), ("x-long", "v" * 300)]


def test_a_failure_is_one_frame_and_its_text_is_escaped() -> None:
    peer = Peer()
    peer.send(peer.call(1))
    peer.fail(peer.connection.arrived[0][0], 3, "é: 100 %", [("x-bin", b"\1")])
    ((kind, flags, stream, fields),) = peer.frames.take()
    assert (kind, flags, stream) == (1, 5, 1)
    assert fields[2:] == [("grpc-status", "3"), ("grpc-message", "%C3%A9: 100 %25"), ("x-bin", "AQ")]


@pytest.mark.parametrize("first", [(), (("x-a", "1"),)], ids=["", "trailers"])
def test_an_answer_waits_for_the_clients_windows(first: Any) -> None:
    """Of the call and of the connection; it leaves in pieces as they open, whole and in order, its status last."""
    peer = Peer()
    peer.send(settings_of(initial_window_size=100), peer.call(1), peer.call(3))
    peer.frames.take()
    (one, _), (three, _) = peer.connection.arrived
    answer = bytes(range(256)) * 200
    peer.answer(one, answer, first)
    peer.answer(three, b"small")  # has room of its own
    kinds = [(kind, stream, len(payload)) for kind, _, stream, payload in peer.frames.take() if kind == http2.DATA]
    assert kinds == [(0, 1, 100), (0, 3, 10)]
    got = prefixed(answer)[:100]
    peer.send(http2.window_update(1, 60_000))
    for _, _, _, payload in (f for f in peer.frames.take() if f[0] == http2.DATA):
        assert len(payload) <= http2.DEFAULT_FRAME
        got += payload
    assert got == prefixed(answer)
    assert not peer.connection.streams


def test_the_connections_window_holds_all_calls_back() -> None:
    peer = Peer()
    peer.send(settings_of(initial_window_size=1 << 20))
    peer.frames.take()
    sizes = 30_000
    for stream in (1, 3, 5):
        peer.send(peer.call(stream))
    calls = [call for call, _ in peer.connection.arrived]
    for call in calls:
        peer.answer(call, b"x" * sizes)
    sent = sum(len(p) for kind, _, _, p in peer.frames.take() if kind == http2.DATA)
    assert sent == http2.DEFAULT_WINDOW
    peer.send(http2.window_update(0, 1 << 20))
    sent += sum(len(p) for kind, _, _, p in peer.frames.take() if kind == http2.DATA)
    assert sent == 3 * (sizes + 5) and not peer.connection.streams


def test_a_window_that_shrinks_below_nothing() -> None:
    """As SETTINGS may make it, while an answer is under way."""
    peer = Peer()
    peer.send(settings_of(initial_window_size=1000), peer.call(1))
    peer.answer(peer.connection.arrived[0][0], b"x" * 5000)
    peer.send(settings_of(initial_window_size=10))
    peer.frames.take()
    peer.send(http2.window_update(1, 900))
    assert not [f for f in peer.frames.take() if f[0] == http2.DATA]
    peer.send(http2.window_update(1, 100))
    assert [len(f[3]) for f in peer.frames.take() if f[0] == http2.DATA] == [10]


def test_a_client_that_gives_up() -> None:
    """Its call is gone at once, and its answer goes nowhere."""
    peer = Peer()
    peer.send(peer.call(1), peer.call(3), http2.reset(1, 8))
    gone = peer.connection.cancelled[0]
    assert gone.number == 1 and list(peer.connection.streams) == [3]
    peer.answer(gone, b"late")
    assert peer.frames.take() == []
    peer.send(http2.reset(1, 8))  # again means nothing


def test_a_connection_that_is_lost() -> None:
    peer = Peer()
    peer.send(peer.call(1), peer.headers(3, OTHER), body(3, b"m", 0), peer.headers(5), body(5, b"half", 0)[:-2])
    peer.connection.lose()
    assert [call.number for call in peer.connection.cancelled] == [1, 3, 5]
    assert peer.heard[0].said == ["cancelled"]
    assert peer.connection.out.share.nbytes == 0 and not peer.connection.arrived


def test_another_method_hears_its_messages_one_by_one() -> None:
    peer = Peer()
    peer.send(peer.headers(1, OTHER))
    (heard,) = peer.heard
    whole = prefixed(b"one") + prefixed(b"") + prefixed(gzip.compress(b"three"), 1)
    call = peer.connection.streams[1]
    call.head.encoding = b"gzip"
    for byte in whole:
        peer.send(http2.frame(http2.DATA, 0, 1, bytes([byte])))
    assert heard.messages == [b"one", b"", b"three"]
    peer.send(http2.frame(http2.DATA, http2.END_STREAM, 1))
    assert heard.said == ["half closed"]
    out = peer.connection.out
    with out.lock:
        assert out.send(call, b"a") and not out.send(call, b"b" * 70_000)
    peer.send(http2.window_update(1, 100_000), http2.window_update(0, 100_000))
    assert heard.said == ["half closed", "writable"]
    with out.lock:
        out.finish(call)
        out.flush()
    frames = peer.frames.take()
    assert b"".join(f[3] for f in frames if f[0] == http2.DATA) == prefixed(b"a") + prefixed(b"b" * 70_000)
    assert frames[-1][3] == [("grpc-status", "0")]


def test_what_a_listener_has_not_read_is_not_asked_for_again() -> None:
    """The window of its call opens with what it consumed, and with what is not a complete message."""
    peer = Peer()
    peer.send(peer.headers(1, OTHER))
    for _ in range(12):
        for start in range(0, 50_000, 16_000):
            peer.send(http2.frame(http2.DATA, 0, 1, prefixed(b"x" * 49_995)[start : start + 16_000]))
    heard = peer.heard[0]
    told = updates(peer, 1)
    call = peer.connection.streams[1]
    assert len(heard.messages) == 12 and call.unacknowledged - call.due == heard.due
    assert told <= 12 * 50_000 - call.unacknowledged
    with peer.connection.out.lock:
        for _ in range(12):
            peer.connection.out.consumed(call, 50_000)
        peer.connection.out.flush()
    assert not call.unacknowledged
    assert 12 * 50_000 - STREAM_WINDOW // 2 <= told + updates(peer, 1) <= 12 * 50_000


def test_the_connections_window_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    window = 1 << 20
    for module in connection, engine:
        monkeypatch.setattr(module, "WINDOW", window)
    peer = Peer()
    sent = told = 0
    for i in range(400):
        peer.send(peer.call(2 * i + 1, b"x" * 60_000))
        sent += 60_005
        told += updates(peer, 0)
        peer.answer(peer.connection.arrived.pop()[0], b"")
        told += updates(peer, 0)
        assert sent - told <= window
    assert told > 0


def refused(peer: Peer) -> list[tuple[int, type, str]]:
    found = [(call.number, type(error), str(error)) for call, error in peer.connection.refused]
    peer.connection.refused.clear()
    return found


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (struct.pack(">BI", 0, MOST + 1), TooLarge, "100001 bytes, the limit is 100000"),
        (struct.pack(">BI", 0, 0xFFFFFFFF), TooLarge, "4294967295 bytes"),
        (prefixed(b"a") + prefixed(b"b"), RunFailed, "a second message"),
        (prefixed(b"a", 1), RunFailed, "without grpc-encoding"),
    ],
)
def test_a_message_that_is_refused_before_its_end(message: bytes, kind: type, words: str) -> None:
    peer = Peer()
    peer.send(peer.headers(1), http2.frame(http2.DATA, 0, 1, message))
    ((stream, found, text),) = refused(peer)
    assert stream == 1 and found is kind and words in text
    assert peer.connection.out.share.nbytes == 0


def test_a_bomb_is_inflated_no_further_than_it_may() -> None:
    peer = Peer()
    bomb = gzip.compress(b"\0" * (MOST * 100))
    peer.send(peer.headers(1, PATH, (b"grpc-encoding", b"gzip")), http2.frame(0, 1, 1, prefixed(bomb, 1)))
    ((stream, packed),) = peer.arrived()
    assert stream == 1 and not isinstance(packed, bytes)  # a large one is inflated by another thread
    assert len(packed) == len(bomb)
    with pytest.raises(TooLarge, match=f"the message has more than {MOST} bytes once it is inflated"):
        packed.inflate()
    peer.send(peer.headers(3, PATH, (b"grpc-encoding", b"gzip")), http2.frame(0, 1, 3, prefixed(bomb[:50], 1)))
    assert refused(peer) == [(3, RunFailed, "a message that cannot be inflated")]
    fine = prefixed(gzip.compress(b"fine"), 1)
    peer.send(peer.headers(5, PATH, (b"grpc-encoding", b"gzip")), http2.frame(0, 1, 5, fine))
    assert peer.arrived() == [(5, b"fine")]
    peer.send(peer.headers(7, PATH, (b"grpc-encoding", b"br")), http2.frame(0, 1, 7, fine))
    assert peer.frames.take()[-1][3][2:] == [
        ("grpc-status", "12"),
        ("grpc-message", "grpc-encoding: expected identity, gzip or deflate"),
    ]


def test_incomplete_messages_have_a_bound_over_all_calls() -> None:
    peer = Peer(held=200_000)  # of which one connection gets what is free for the others
    half = struct.pack(">BI", 0, 60_000) + b"x" * 40_000
    peer.send(peer.headers(1), http2.frame(0, 0, 1, half), peer.headers(3), http2.frame(0, 0, 3, half))
    assert not refused(peer)
    peer.send(peer.headers(5), http2.frame(0, 0, 5, half))
    ((stream, kind, _),) = refused(peer)
    assert stream == 5 and kind is TooLarge
    assert peer.connection.out.share.nbytes == 2 * len(half)  # the refused one counts no longer
    peer.connection.lose()
    assert peer.connection.out.share.nbytes == 0


def test_a_message_that_breaks_in_the_middle_counts_no_longer() -> None:
    peer = Peer()
    broken = prefixed(b"no gzip" * 9000, 1)
    peer.send(peer.headers(1, PATH, (b"grpc-encoding", b"gzip")), http2.frame(0, 0, 1, broken[:40_000]))
    assert peer.connection.out.share.nbytes == 40_000
    peer.send(http2.frame(0, 0, 1, broken[40_000:]), http2.frame(0, 1, 1, prefixed(b"more")))
    assert [kind for _, kind, _ in refused(peer)] == [RunFailed]  # once, whatever else comes
    assert peer.connection.out.share.nbytes == 0 and not peer.arrived()


def test_a_complete_message_counts_until_its_call_arrives() -> None:
    """A client that never ends its calls could keep as many of them as it liked."""
    peer = Peer(held=200_000)
    for stream in range(1, 9, 2):
        peer.send(peer.headers(stream), body(stream, b"x" * 30_000, 0))
    assert [stream for stream, _, _ in refused(peer)] == [7]
    peer.send(*[http2.frame(0, 1, stream) for stream in (1, 3, 5)])
    assert [stream for stream, _ in peer.arrived()] == [1, 3, 5]
    assert peer.connection.out.share.nbytes == 0


def test_messages_that_nobody_reads_are_bounded_by_the_window_of_their_call() -> None:
    """However they are cut: the room that a complete message took comes back when it was read, and no sooner."""
    peer = Peer()
    peer.send(peer.headers(1, OTHER))
    call, sent, room = peer.connection.streams[1], 0, STREAM_WINDOW
    while room >= 60_000:
        for piece in (prefixed(b"x" * 50_000)[:-1], b"x"):
            for start in range(0, len(piece), 16_000):
                peer.send(http2.frame(0, 0, 1, piece[start : start + 16_000]))
            room -= len(piece)
        sent += 1
        room += updates(peer, 1)
    assert sent * 50_000 <= STREAM_WINDOW + 2 * 50_000
    assert peer.connection.out.share.nbytes >= sent * 50_000
    with peer.connection.out.lock:
        for _ in range(sent):
            peer.connection.out.consumed(call, 50_005)  # with its prefix
        peer.connection.out.flush()
    assert peer.connection.out.share.nbytes == 0 and room + updates(peer, 1) > STREAM_WINDOW // 2


def test_more_than_a_window_has_ends_the_connection() -> None:
    peer = Peer()
    peer.send(peer.headers(1, OTHER))
    small = http2.frame(0, 0, 1, prefixed(b"x" * 60_000))
    peer.fails(http2.FLOW_CONTROL_ERROR, *[small] * 20)


def test_a_call_that_is_refused_for_its_headers_is_not_run() -> None:
    peer = Peer()
    peer.send(peer.call(1, b"m", (b"grpc-timeout", b"soon")), peer.call(3, b"m", (b"x-large", b"v" * 5000)))
    assert [stream for stream, _, _ in refused(peer)] == [1, 3]
    assert not peer.arrived()


def test_an_answer_that_is_not_taken_is_given_up() -> None:
    peer = Peer()
    peer.send(settings_of(initial_window_size=10), peer.call(1))
    peer.answer(peer.connection.arrived[0][0], b"x" * 100)
    peer.frames.take()
    for _ in range(3):
        peer.connection.expire_stalled(100, 3)
    peer.send(http2.window_update(1, 10))  # a little is taken: it begins anew
    for _ in range(3):
        peer.connection.expire_stalled(100, 3)
    assert peer.connection.out.queued
    peer.frames.take()
    peer.connection.expire_stalled(100, 3)
    assert peer.frames.take() == [(http2.RST_STREAM, 0, 1, http2.CANCEL.to_bytes(4, "big"))]
    assert not peer.connection.out.queued


def test_a_call_that_the_library_ends_while_the_socket_is_full() -> None:
    """It ends when the reset leaves, maybe from another thread, and hears of it though its client says no more."""
    peer = Peer()
    peer.send(peer.headers(1, OTHER))
    peer.frames.full = True
    peer.send(peer.headers(1, OTHER))  # again: an error of the stream
    peer.frames.full = False
    with peer.connection.out.lock:
        peer.connection.out.flush()
    assert (http2.RST_STREAM, 1) in [f[:3:2] for f in peer.frames.take()]
    peer.connection.expire_stalled(100, 100)
    assert peer.heard[0].said == ["cancelled"] and not peer.connection.streams


@pytest.mark.parametrize("message", [None, b"m"])
def test_a_status_leaves_with_what_fills_the_window(message: bytes | None) -> None:
    """It needs none of the window itself (RFC 9113, 5.2.1)."""
    peer = Peer()
    peer.send(settings_of(initial_window_size=0 if message is None else 6), peer.headers(1, OTHER, flags=5))
    peer.frames.take()
    out = peer.connection.out
    with out.lock:
        out.finish(peer.connection.streams[1], (), message)
        out.flush()
    frames = peer.frames.take()
    assert b"".join(f[3] for f in frames if f[0] == http2.DATA) == (prefixed(message) if message else b"")
    assert frames[-1][3][-1] == ("grpc-status", "0")


@pytest.mark.parametrize("opens", [False, True])
def test_a_status_behind_messages_that_filled_the_window(opens: bool) -> None:
    """It comes once there is a window again; a call whose client opens none is given up, and not kept for ever."""
    peer = Peer()
    peer.send(settings_of(initial_window_size=6), peer.headers(1, OTHER, flags=5))
    out, call = peer.connection.out, peer.connection.streams[1]
    with out.lock:
        assert out.send(call, b"m")
        out.finish(call)
        out.flush()
    peer.frames.take()
    if opens:
        peer.send(http2.window_update(1, 1))
    for _ in range(5):
        peer.connection.expire_stalled(100, 3)
    ((kind, _, stream, last),) = peer.frames.take()
    if opens:
        assert (kind, stream, last) == (http2.HEADERS, 1, [("grpc-status", "0")])
    else:
        assert (kind, stream, last) == (http2.RST_STREAM, 1, http2.CANCEL.to_bytes(4, "big"))
    assert not out.waits


@pytest.mark.parametrize("how", ["answer", "failure"])
def test_a_smaller_header_table_is_confirmed_in_the_next_block(how: str) -> None:
    """As RFC 7541 asks in 4.2."""
    peer = Peer()
    peer.frames._decoder.max_allowed_table_size = 100  # which the library insists on
    peer.send(settings_of(header_table_size=100), peer.call(1), peer.call(3))
    peer.frames.take()
    for call, _ in list(peer.connection.arrived):
        if how == "answer":
            peer.answer(call, b"a")
        else:
            peer.fail(call, 3, "no")
    blocks = [f for f in peer.frames.take() if f[0] == http2.HEADERS]
    assert blocks[-1][3][-1][0] in ("grpc-status", "grpc-message")


def test_calls_that_are_still_being_wound_up_count() -> None:
    """A client may not have more of them made, by resetting them, than it may have calls."""
    peer = Peer(max_streams=2)
    peer.connection.out.listeners = 2
    peer.send(peer.headers(1, OTHER))
    assert peer.frames.take()[0][:3] == (http2.RST_STREAM, 0, 1)
    assert not peer.heard


def test_a_long_text_is_cut_where_it_may_be() -> None:
    peer = Peer()
    peer.send(peer.call(1))
    peer.fail(peer.connection.arrived[0][0], 3, "é" * 3000)
    text = peer.frames.take()[0][3][-1][1]
    most = response_fields.TEXT_BYTES
    assert text == "%C3%A9" * (most // 6) + "%C3"[: most % 6 // 3 * 3]


@pytest.mark.parametrize("flags", [4, 5])
def test_a_call_without_a_message(flags: int) -> None:
    peer = Peer()
    peer.send(peer.headers(1, flags=flags), b"" if flags == 5 else http2.frame(0, 1, 1))
    assert refused(peer) == [(1, InvalidRequest, "the call carried no message")]


def test_a_message_that_ends_too_early() -> None:
    peer = Peer()
    peer.send(peer.headers(1), http2.frame(0, 1, 1, prefixed(b"message")[:-1]))
    assert refused(peer) == [(1, InvalidRequest, "the call ended within a message")]


def test_a_message_that_does_not_come() -> None:
    peer = Peer()
    peer.send(peer.headers(1), peer.call(3), peer.headers(5, OTHER))
    for _ in range(3):
        peer.connection.expire_stalled(3, 100)
        assert not refused(peer)
    peer.connection.expire_stalled(3, 100)
    assert refused(peer) == [(1, InvalidRequest, "nothing more of the message within 3 s")]


def test_what_is_no_call() -> None:
    peer = Peer()
    peer.send(peer.headers(1, b"/no/such"))
    frames = peer.frames.take()
    assert frames[0][3][2:] == [("grpc-status", "12"), ("grpc-message", "there is no method /no/such here")]
    assert len(frames) == 1
    fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"test"), (b":path", b"/")]
    get = peer.encoder.encode(fields)
    peer.send(http2.frame(http2.HEADERS, 5, 3, get))
    assert peer.frames.take() == [(1, 5, 3, [(":status", "405")])]
    peer.send(peer.headers(5, PATH, (b"grpc-timeout", b"soon")))
    ((_, kind, _),) = refused(peer)
    assert kind is RunFailed
    peer.send(peer.headers(7, PATH, (b"x-large", b"v" * 5000)), body(7, b"m"))
    assert refused(peer)[0][1:] == (TooLarge, "the metadata has more than 4096 bytes")
    assert UnknownMethod.status == 12


STOP = (http2.RST_STREAM, 0, 1, b"\0\0\0\0")  # the rest of it need not be sent


def test_nothing_follows_a_refusal_whose_call_ends() -> None:
    """nginx takes the next call on its connection to have failed, where a frame comes for one that is over."""
    peer = Peer()
    peer.send(peer.headers(1, b"/no/such"))
    assert [frame[:3] for frame in peer.frames.take()] == [(http2.HEADERS, 5, 1)]
    peer.send(body(1, b"m"))
    peer.connection.expire_stalled(100, 100)
    peer.connection.expire_stalled(100, 100)
    peer.send(peer.call(3))
    assert peer.frames.take() == []


def test_a_refused_call_that_goes_on_is_stopped() -> None:
    peer = Peer()
    peer.send(peer.headers(1, b"/no/such"), body(1, b"m", 0))
    assert [frame[:3] for frame in peer.frames.take()] == [(http2.HEADERS, 5, 1), STOP[:3]]
    peer.send(body(1, b"m", 0))
    assert peer.frames.take() == []


def test_a_refused_call_of_which_nothing_comes_is_stopped() -> None:
    peer = Peer()
    peer.send(peer.headers(1, b"/no/such"))
    peer.frames.take()
    peer.connection.expire_stalled(100, 100)
    assert peer.frames.take() == []  # it may have come just now
    peer.connection.expire_stalled(100, 100)
    assert peer.frames.take() == [STOP]


def test_more_calls_than_may_be() -> None:
    """Before the client knows the limit, those over it are refused so that it tries again; later they are an error."""
    peer = Peer(max_streams=2, greet=False)
    peer.send(http2.PREFACE, http2.frame(http2.SETTINGS, 0, 0), peer.call(1), peer.call(3), peer.call(5))
    assert (http2.RST_STREAM, 0, 5, b"\0\0\0\7") in peer.frames.take()
    peer.answer(peer.connection.arrived[0][0], b"")
    peer.send(http2.frame(http2.SETTINGS, http2.ACK, 0), peer.call(7))
    assert [stream for stream, _ in peer.arrived()] == [1, 3, 7]
    peer.fails(http2.PROTOCOL_ERROR, peer.call(9))


def test_headers_in_pieces_with_padding_and_priority() -> None:
    peer = Peer()
    block = peer.headers(1)[9:]
    first = bytes([2]) + b"\0\0\0\0\x10" + block[:5] + b"\0\0"
    peer.send(
        http2.frame(http2.HEADERS, http2.PADDED | http2.HAS_PRIORITY, 1, first),
        http2.frame(http2.CONTINUATION, 0, 1, block[5:9]),
        http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[9:]),
        body(1, b"m"),
    )
    assert peer.arrived() == [(1, b"m")]


def test_trailers_end_a_call() -> None:
    peer = Peer()
    peer.send(peer.headers(1), body(1, b"m", 0))
    peer.send(http2.frame(http2.HEADERS, 5, 1, peer.encoder.encode([(b"x-last", b"1")])))
    assert peer.arrived() == [(1, b"m")]
    peer.send(peer.call(3))
    assert peer.arrived() == [(3, b"m")]  # the table is still in step


def test_control_frames() -> None:
    peer = Peer()
    peer.send(
        http2.frame(http2.PING, 0, 0, b"12345678"),
        http2.frame(http2.PING, http2.ACK, 0, b"12345678"),
        http2.frame(http2.PRIORITY, 0, 1, b"\0\0\0\0\0"),
        http2.frame(0x42, 7, 99, b"nobody knows"),
        settings_of(max_frame_size=20_000),
    )
    assert sorted(peer.frames.take()) == [(4, 1, 0, b""), (6, 1, 0, b"12345678")]


def test_a_client_that_goes() -> None:
    """Its calls are answered; then the connection is over."""
    peer = Peer()
    peer.send(peer.call(1), http2.goaway(0, 0))
    assert not peer.connection.closed
    peer.answer(peer.connection.arrived[0][0], b"a")
    assert peer.frames.take()[-1][3] == [("grpc-status", "0")]
    peer.connection.expire_stalled(10, 10)
    assert peer.connection.closed


def test_the_greeting_says_what_is_bounded() -> None:
    peer = Peer(greet=False)
    frames = Frames()
    frames(peer.connection.out)
    (kind, _, _, payload), update = frames.take()
    values = dict(struct.iter_unpack(">HI", payload))
    assert kind == http2.SETTINGS
    assert values == {3: 100, 4: STREAM_WINDOW, 5: LARGEST_FRAME, 6: 4096}
    assert update == (8, 0, 0, (WINDOW - http2.DEFAULT_WINDOW).to_bytes(4, "big"))


RULES: dict[str, tuple[int, Any]] = {
    "DATA of nothing": (http2.PROTOCOL_ERROR, lambda _: body(1, b"m")),
    "DATA of stream 0": (http2.PROTOCOL_ERROR, lambda _: body(0, b"m")),
    "DATA after the end": (http2.STREAM_CLOSED, lambda p: p.call(1) + body(1, b"m")),
    "an even stream": (http2.PROTOCOL_ERROR, lambda p: p.headers(2)),
    "a frame too large": (http2.FRAME_SIZE_ERROR, lambda _: b"\xff\xff\xff\0\0\0\0\0\1"),
    "no HPACK": (http2.COMPRESSION_ERROR, lambda _: http2.frame(1, 4, 1, b"\x80")),
    "no HPACK in pieces": (
        http2.COMPRESSION_ERROR,
        lambda _: http2.frame(1, 0, 1, b"\x80") + http2.frame(9, 4, 1),
    ),
    "headers interrupted": (http2.PROTOCOL_ERROR, lambda _: http2.frame(1, 0, 1, b"\x82") + body(1, b"m")),
    "headers interrupted by headers": (http2.PROTOCOL_ERROR, lambda p: http2.frame(1, 0, 1, b"\x82") + p.headers(3)),
    "headers without end": (
        http2.ENHANCE_YOUR_CALM,
        lambda _: http2.frame(1, 0, 1, b"\x82") + http2.frame(9, 0, 1, b"\x82") * 100,
    ),
    "CONTINUATION of nothing": (http2.PROTOCOL_ERROR, lambda _: http2.frame(9, 4, 1, b"\x82")),
    "padding beyond the frame": (http2.PROTOCOL_ERROR, lambda p: p.headers(1) + http2.frame(0, 8, 1, b"\xff")),
    "a short PING": (http2.FRAME_SIZE_ERROR, lambda _: http2.frame(6, 0, 0, b"1")),
    "a short RST_STREAM": (http2.FRAME_SIZE_ERROR, lambda p: p.headers(1) + http2.frame(3, 0, 1, b"1")),
    "a push": (http2.PROTOCOL_ERROR, lambda _: http2.frame(5, 4, 1, b"\0" * 8)),
    "half a SETTINGS": (http2.FRAME_SIZE_ERROR, lambda _: http2.frame(4, 0, 0, b"123")),
    "SETTINGS of a stream": (http2.PROTOCOL_ERROR, lambda _: http2.frame(4, 0, 1)),
    "a window too large": (http2.FLOW_CONTROL_ERROR, lambda _: settings_of(initial_window_size=1 << 31)),
    "frames too small": (http2.PROTOCOL_ERROR, lambda _: settings_of(max_frame_size=100)),
    "a window that overflows": (http2.FLOW_CONTROL_ERROR, lambda _: http2.window_update(0, (1 << 31) - 1)),
    "a WINDOW_UPDATE of nothing": (http2.PROTOCOL_ERROR, lambda _: http2.window_update(0, 0)),
}


def test_a_call_that_begins_twice_is_reset() -> None:
    peer = Peer()
    peer.send(peer.headers(1) + peer.headers(1), peer.call(3))
    assert (http2.RST_STREAM, 0, 1, b"\0\0\0\1") in peer.frames.take()
    assert [call.number for call in peer.connection.cancelled] == [1] and peer.arrived() == [(3, b"m")]


C_CORE = b"grpc-python/1.62.3 grpc-c/39.0.0 (linux; chttp2)"


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.booleans())
def test_resets_of_calls_that_were_never_opened(cuts: list[int], known: bool) -> None:
    """Ignored where the client is one that sends them, however the bytes are cut; also before it said what it is."""
    peer = Peer()
    agent = (b"user-agent", C_CORE)
    data = b"" if known else http2.reset(1, 8)
    data += peer.call(3, b"one", agent) + http2.reset(5, 8) + http2.reset(7, 8) + peer.call(9, b"two", agent)
    data += http2.reset(9, 8) + peer.call(11, b"three", agent)
    for cut in [*cuts, len(data)]:
        peer.send(data[:cut])
        data = data[cut:]
    assert peer.arrived() == [(3, b"one"), (9, b"two"), (11, b"three")]
    assert [call.number for call in peer.connection.cancelled] == [9] and not peer.connection.closed


def test_resets_of_calls_that_were_never_opened_by_a_client_that_knows_better() -> None:
    peer = Peer()
    peer.send(peer.call(1, b"m", (b"user-agent", b"grpc-python/1.85.3 grpc-c/58.0.0 (linux; chttp2)")))
    peer.fails(http2.PROTOCOL_ERROR, http2.reset(3, 8))


def test_resets_of_calls_that_were_never_opened_are_bounded() -> None:
    """As many are taken as there could be such calls, and some more."""
    peer = Peer()
    agent = (b"user-agent", C_CORE)
    peer.send(peer.call(1, b"m", agent))
    for stream in range(3, 3 + 20 * STRAY_RESETS, 20):  # nine cancelled calls for one that is not
        peer.send(*[http2.reset(stream + 2 * i, 8) for i in range(9)], peer.call(stream + 18, b"m", agent))
        peer.answer(peer.connection.streams[stream + 18], b"")
    assert list(peer.connection.streams) == [1] and not peer.connection.cancelled
    last = stream + 18
    peer.fails(http2.PROTOCOL_ERROR, *[http2.reset(last + 2, 8)] * (STRAY_RESETS + last // 2 + 1))


def test_a_client_is_asked_to_go_in_two_steps() -> None:
    """What it sent before it knew is served; the last word names the last call that is."""
    peer = Peer()
    peer.connection.depart("because")
    first, ping = peer.frames.take()
    assert first == (http2.GOAWAY, 0, 0, struct.pack(">II", http2.LAST_STREAM, 0))
    assert ping == (http2.PING, 0, 0, HEARD)
    peer.send(peer.call(1), http2.frame(http2.PING, http2.ACK, 0, HEARD))
    assert peer.frames.take() == [(http2.GOAWAY, 0, 0, struct.pack(">II", 1, 0) + b"because")]
    peer.send(peer.call(3))  # as a client must not
    ((call, _),) = peer.connection.arrived
    assert call.number == 1 and peer.connection.draining and not peer.connection.closed
    peer.answer(call, b"")
    peer.connection.expire_stalled(10, 10)
    assert peer.connection.closed


@pytest.mark.parametrize("rule", RULES)
def test_what_breaks_the_rules(rule: str) -> None:
    code, data = RULES[rule]
    peer = Peer()
    peer.fails(code, data(peer))


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/1.1\r\n"])
def test_what_is_not_http2(data: bytes) -> None:
    Peer(greet=False).fails(http2.PROTOCOL_ERROR, data)


def test_the_preface_may_come_byte_by_byte() -> None:
    peer = Peer(greet=False)
    for byte in http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + peer.call(1):
        peer.send(bytes([byte]))
    assert peer.arrived() == [(1, b"m")]


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_junk_ends_the_connection_or_means_nothing(junk: bytes, greeted: bool) -> None:
    """No other exception, and nothing that was not sent comes out."""
    peer = Peer()
    with contextlib.suppress(ConnectionFailed):
        peer.send(peer.call(1) if greeted else b"", junk)
    assert peer.arrived() in ([], [(1, b"m")])


def test_answers_that_are_held_leave_together_with_the_next_flush() -> None:
    """Also those that the client's window holds up: they are watched from then on."""
    peer = Peer()
    peer.send(settings_of(initial_window_size=20), peer.call(1), peer.call(3))
    peer.frames.take()
    out = peer.connection.out
    (one, _), (three, _) = peer.connection.arrived
    with out.lock:
        out.respond([(one, b"small", ())], hold=True)
        out.respond([(three, b"x" * 100, ())], hold=True)
        assert not peer.frames.data
        out.flush()
    assert [stream for kind, _, stream, _ in peer.frames.take() if kind == http2.HEADERS] == [1, 3, 1]
    assert out.is_blocked(three) and not out.is_blocked(one)
    peer.send(http2.window_update(3, 1000))
    assert peer.frames.take()[-1][3] == [("grpc-status", "0")] and not out.waits


HEADS = st.lists(
    st.sampled_from([(b"grpc-timeout", b"20m"), (b"grpc-timeout", b"30m"), (b"x-a", b"1"), (b"x-a", b"2")]), max_size=3
)


@settings(deadline=None)
@given(st.lists(st.tuples(HEADS, st.integers(1, 3)), min_size=1, max_size=8))
def test_every_call_has_the_head_that_it_was_sent_with(calls: list[tuple[list[tuple[bytes, bytes]], int]]) -> None:
    """Calls that say the same, one after the other, share it."""
    peer = Peer()
    wanted = [fields for fields, again in calls for _ in range(again)]
    peer.send(*[peer.call(2 * i + 1, b"m", *fields) for i, fields in enumerate(wanted)])
    heads = [call.head for call, _ in peer.connection.arrived]
    assert [
        list(head.fields[-len(fields) :]) if fields else [] for head, fields in zip(heads, wanted, strict=True)
    ] == wanted
    assert all((a is b) == (a.fields == b.fields) for a, b in itertools.pairwise(heads))
