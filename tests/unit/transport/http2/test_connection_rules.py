"""HTTP/2's rules one by one, as h2spec has them (RFC 9113, RFC 7541): what breaks one ends the call or the connection
with the code for it, whatever the pieces it comes in, and all else goes on.

Where HTTP/2 leaves a choice, or libnghttp2 is stricter, the code is libnghttp2's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from tests.service import http2_frames as http2
from tests.unit.transport.http2.test_connection import PATH, Peer, settings_of

from forwardpass.transport.http2 import engine
from forwardpass.transport.http2.connection import ConnectionFailed
from forwardpass.transport.http2.engine import LARGEST_FRAME

FIELDS = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"t"), (b":path", PATH)]
FIELDS += [(b"content-type", b"application/grpc")]
MOST = http2.LARGEST_WINDOW
frame = http2.frame


def literal(*fields: tuple[bytes, bytes]) -> bytes:
    return b"".join([b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in fields])


def call(*more: tuple[bytes, bytes], flags: int = 5, fields: list[tuple[bytes, bytes]] = FIELDS) -> bytes:
    return frame(1, flags, 1, literal(*fields, *more))


def half(flags: int, *rest: bytes) -> bytes:
    """A header block that something comes into the middle of."""
    return frame(1, flags, 1, literal(*FIELDS)) + b"".join(rest)


OPEN = call(flags=4)
OK, CALL, CONNECTION = "ok", "call", "connection"
Case = tuple[str, str, int, bytes]
CASES: list[Case] = [
    ("4.1", OK, 0, frame(0x16, 0, 0, bytes(8))),
    ("4.1, flags", OK, 0, frame(6, 0x16, 0, bytes(8))),
    ("4.1, the reserved bit", OK, 0, frame(6, 0, 1 << 31, bytes(8))),
    ("4.2, HEADERS", CONNECTION, 6, frame(1, 5, 1, bytes(LARGEST_FRAME + 1))),
    ("4.3", CONNECTION, 9, frame(1, 5, 1, b"\x40")),
    ("4.3, PRIORITY within", CONNECTION, 1, half(1, frame(2, 0, 1, b"\0\0\0\0\xff"))),
    ("4.3, HEADERS within", CONNECTION, 1, half(1, frame(1, 5, 3, literal(*FIELDS)))),
    ("5.1, idle: DATA", CONNECTION, 1, frame(0, 1, 1, b"t")),
    ("5.1, idle: WINDOW_UPDATE", CONNECTION, 1, http2.window_update(1, 8)),
    ("5.1, idle: CONTINUATION", CONNECTION, 1, frame(9, 4, 1, literal(*FIELDS))),
    ("5.1, half closed: DATA", CONNECTION, 5, OPEN + frame(0, 1, 1, bytes(6)) * 2),
    ("5.1, half closed: CONTINUATION", CONNECTION, 1, OPEN + frame(0, 1, 1, bytes(6)) + frame(9, 4, 1)),
    ("5.1, closed: DATA", OK, 0, OPEN + http2.reset(1, 8) + frame(0, 1, 1, b"t")),
    ("5.1, closed: CONTINUATION", CONNECTION, 1, OPEN + http2.reset(1, 8) + frame(9, 4, 1)),
    ("5.1.1", CONNECTION, 1, frame(1, 5, 2, literal(*FIELDS))),
    ("5.3.1", OK, 0, frame(2, 0, 1, b"\0\0\0\1\xff")),
    ("5.5, within a block", CONNECTION, 1, half(1, frame(0x16, 0, 0))),
    ("6.1", CONNECTION, 1, frame(0, 1, 0, b"t")),
    ("6.1, padding", CONNECTION, 1, OPEN + frame(0, 9, 1, b"\6Test")),
    ("6.2", CONNECTION, 1, frame(1, 5, 0, literal(*FIELDS))),
    ("6.2, padding", CONNECTION, 1, frame(1, 13, 1, b"\xff" + literal(*FIELDS))),
    ("6.3", CONNECTION, 6, OPEN + frame(2, 0, 1, b"\x80\0\0\1")),
    ("6.4", CONNECTION, 1, http2.reset(0, 8)),
    ("6.4, length", CONNECTION, 6, OPEN + frame(3, 0, 1, bytes(3))),
    ("6.5, ACK", CONNECTION, 6, frame(4, 1, 0, b"\0")),
    ("6.5, stream", CONNECTION, 1, frame(4, 0, 1, b"\0\3\0\0\0\x64")),
    ("6.5, length", CONNECTION, 6, frame(4, 0, 0, b"\0\3\0")),
    ("6.5.2, push", CONNECTION, 1, frame(4, 0, 0, b"\0\2\0\0\0\2")),
    ("6.5.2, window", CONNECTION, 3, settings_of(initial_window_size=1 << 31)),
    ("6.5.2, small frames", CONNECTION, 1, settings_of(max_frame_size=(1 << 14) - 1)),
    ("6.5.2, large frames", CONNECTION, 1, settings_of(max_frame_size=1 << 24)),
    ("6.5.2, unknown", OK, 0, frame(4, 0, 0, b"\0\xff\0\0\0\1")),
    ("6.6", CONNECTION, 1, frame(5, 4, 1, b"\0\0\0\2" + literal(*FIELDS))),
    ("6.7, ACK", OK, 0, frame(6, 1, 0, bytes(8))),
    ("6.7, stream", CONNECTION, 1, frame(6, 0, 1, bytes(8))),
    ("6.7, length", CONNECTION, 6, frame(6, 0, 0, bytes(6))),
    ("6.8, stream", CONNECTION, 1, frame(7, 0, 1, bytes(8))),
    ("6.8, length", CONNECTION, 6, frame(7, 0, 0, bytes(4))),
    ("6.9", CONNECTION, 1, http2.window_update(0, 0)),
    ("6.9, call", CONNECTION, 1, OPEN + http2.window_update(1, 0)),
    ("6.9, length", CONNECTION, 6, frame(8, 0, 0, bytes(3))),
    ("6.9.1, call", CONNECTION, 3, OPEN + http2.window_update(1, MOST)),
    ("6.9.1", CONNECTION, 3, http2.window_update(0, MOST)),
    (
        "6.9.2",
        CONNECTION,
        3,
        OPEN + http2.window_update(1, MOST - http2.DEFAULT_WINDOW) + settings_of(initial_window_size=1 << 16),
    ),
    ("6.10", OK, 0, half(0, frame(9, 0, 1, literal((b"x-a", b"1"))), frame(9, 4, 1))),
    ("6.10, stream 0", CONNECTION, 1, half(1, frame(9, 4, 0))),
    ("6.10, another", CONNECTION, 1, half(1, frame(9, 4, 3))),
    ("6.10, after the end", CONNECTION, 1, OPEN + frame(9, 4, 1)),
    ("6.10, after DATA", CONNECTION, 1, OPEN + frame(0, 0, 1, b"\0") + frame(9, 4, 1)),
    *[
        (f"8.2, {name!r}: {value!r}", CALL, 1, call((name, value)))
        for name, value in [
            (b"X-TEST", b"ok"),
            (b"x a", b"1"),
            (b"", b"1"),
            (b"x-a", b"a\r\nb"),
            (b"x-a", b"a\0b"),
            (b"x-a", b" a"),
            (b"connection", b"keep-alive"),
            (b"keep-alive", b"1"),
            (b"transfer-encoding", b"chunked"),
            (b"upgrade", b"h2c"),
            (b"te", b"trailers, deflate"),
            (b":test", b"ok"),
            (b":status", b"200"),
            (b":method", b"POST"),
        ]
    ],
    *[(f"8.3.1, without {FIELDS[i][0]!r}", CALL, 1, call(fields=FIELDS[:i] + FIELDS[i + 1 :])) for i in (0, 1, 3)],
    *[(f"8.3.1, {FIELDS[i][0]!r} twice", CALL, 1, call(fields=[FIELDS[i], *FIELDS])) for i in (0, 1, 3)],
    ("8.3.1, an empty path", CALL, 1, call(fields=[*FIELDS[:3], (b":path", b""), FIELDS[4]])),
    ("8.1, trailers that are none", CALL, 1, OPEN + frame(0, 0, 1, b"\0") + frame(1, 5, 1, literal(FIELDS[0]))),
    ("8.1, trailers without end", CALL, 1, OPEN + frame(0, 0, 1, b"\0") + frame(1, 4, 1, literal((b"x-a", b"1")))),
    ("8.1.1, too long", CALL, 1, call((b"content-length", b"1"), flags=4) + frame(0, 1, 1, bytes(6))),
    ("8.1.1, in pieces", CALL, 1, call((b"content-length", b"1"), flags=4) + frame(0, 0, 1, b"\0") * 2),
    ("8.1.1, too short", CALL, 1, call((b"content-length", b"9"), flags=4) + frame(0, 1, 1, bytes(6))),
    ("HPACK 2.3.3", CONNECTION, 9, frame(1, 5, 1, b"\xc6")),
    ("HPACK 4.2", CONNECTION, 9, frame(1, 5, 1, literal(*FIELDS) + b"\x20")),
    ("HPACK 5.1", CONNECTION, 9, frame(1, 5, 1, b"\xff" * 7)),
    ("HPACK 5.2, long padding", CONNECTION, 9, frame(1, 5, 1, b"\0\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff")),
    ("HPACK 5.2, EOS", CONNECTION, 9, frame(1, 5, 1, b"\0\x85\xf2\xb2\x4a\x84\xff\x87\x49\x50\x9f\xff\xff\xff\xff")),
    ("HPACK 6.1", CONNECTION, 9, frame(1, 5, 1, b"\x80")),
    ("HPACK 6.3", CONNECTION, 9, frame(1, 5, 1, b"\x3f\xe1\xff\x03" + literal(*FIELDS))),
]


@pytest.mark.parametrize("cut", [1, 1 << 20], ids=["byte by byte", "at once"])
@pytest.mark.parametrize(("ends", "code", "data"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_rule(ends: str, code: int, data: bytes, cut: int) -> None:
    peer = Peer()
    data += b"" if ends == CONNECTION else peer.call(101, b"after")
    with contextlib.suppress(ConnectionFailed):
        for start in range(0, len(data), cut):
            peer.send(data[start : start + cut])
    frames = peer.frames.take()
    resets = [f[3] for f in frames if f[0] == http2.RST_STREAM]
    goaways = [f[3][4:8] for f in frames if f[0] == http2.GOAWAY]
    told = code.to_bytes(4, "big")
    assert goaways == ([told] if ends == CONNECTION else []) and peer.connection.closed == (ends == CONNECTION)
    assert resets == ([told] if ends == CALL else [])
    if ends != CONNECTION:
        assert peer.arrived()[-1:] == [(101, b"after")]
    peer.connection.lose()
    assert not peer.connection.streams and peer.connection.out.share.nbytes == 0


@pytest.mark.parametrize(
    ("flood", "ends"),
    [
        (lambda _: http2.window_update(0, 1), False),
        (lambda _: frame(2, 0, 1, bytes(5)), True),
        (lambda _: frame(0x42, 0, 0, b"x"), True),
        (lambda i: frame(0, 0, 1) if i else OPEN, True),
        (lambda i: frame(1, 4, 2 * i + 1, literal(*FIELDS)) + http2.reset(2 * i + 1, 8), False),
    ],
    ids=["WINDOW_UPDATE", "PRIORITY", "unknown", "empty DATA", "calls that are reset"],
)
def test_a_flood(flood: Callable[[int], bytes], ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no client needs so much of ends the connection; what one may need leaves nothing behind."""
    monkeypatch.setattr(engine, "GLITCHES", (10_000, 300))
    engine._configuration.cache_clear()
    peer = Peer()
    engine._configuration.cache_clear()
    with contextlib.suppress(ConnectionFailed):
        for first in range(0, 30_000, 1000):
            peer.send(*[flood(i) for i in range(first, first + 1000)])
            peer.frames.take()
            peer.connection.cancelled.clear()
            peer.connection.arrived.clear()
    assert peer.connection.closed == ends
    peer.connection.lose()
    assert not peer.connection.streams and not peer.connection.out.waits and peer.connection.out.share.nbytes == 0
