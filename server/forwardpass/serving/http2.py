"""HTTP/2 frames (RFC 9113) and gRPC's use of them, as bytes: what this server sends. Pure."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_STRUCT: Final = struct.Struct(">IBI")  # (length << 8 | kind, flags, stream)
MESSAGE_STRUCT: Final = struct.Struct(">BI")  # before every message of gRPC: whether it is compressed, its length

# Kinds of frames.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
# Flags.
ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20
# Error codes.
NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB
# Settings.
HEADER_TABLE_SIZE: Final = 0x1
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME: Final = 16_384
DEFAULT_TABLE: Final = 4096  # bytes of headers that each side keeps of the other's
LARGEST_WINDOW: Final = 2**31 - 1
LAST_STREAM: Final = 2**31 - 1

# What goes before and after the message of every answer. Nothing of it enters the client's header table, so it is
# always the same bytes: ":status: 200", "content-type: application/grpc"; "grpc-status: 0".
_OPENING: Final = b"\x88\x0f\x10\x10application/grpc"
_CLOSING: Final = b"\x00\x0bgrpc-status\x010"
_RESIZED: Final = b"\x20"  # the header table has 0 bytes: nothing is ever put into it
TEXT_BYTES: Final = 4096  # of a status text: clients take so much metadata without a murmur
_UNESCAPED: Final = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # beside letters and digits


class ConnectionFailed(Exception):
    """The client broke HTTP/2's rules. The connection ends with `code`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return HEAD_STRUCT.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame; the names are those above, in lower case."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", globals()[n.upper()], v) for n, v in values.items()))


def window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big"))


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_stream, code) + text.encode())


OPENING_HEAD: Final = HEAD_STRUCT.pack(len(_OPENING) << 8 | HEADERS, END_HEADERS, 0)[:5]
CLOSING_HEAD: Final = HEAD_STRUCT.pack(len(_CLOSING) << 8 | HEADERS, END_HEADERS | END_STREAM, 0)[:5]


def answer(stream: int, message: bytes) -> bytes:
    """A whole successful answer of one message, which must fit the windows and one frame."""
    number = stream.to_bytes(4, "big")
    size = len(message)
    return b"".join(
        (
            OPENING_HEAD, number, _OPENING,
            (size + 5).to_bytes(3, "big"), b"\0\0", number, b"\0", size.to_bytes(4, "big"), message,
            CLOSING_HEAD, number, _CLOSING,
        )
    )  # fmt: skip


def opening(stream: int, resized: bool = False) -> bytes:
    """The headers of an answer. `resized`: the first since the client asked for a smaller header table."""
    return frame(HEADERS, END_HEADERS, stream, _RESIZED * resized + _OPENING)


def closing(stream: int, metadata: Iterable[tuple[str, str | bytes]] = ()) -> bytes:
    """The trailers of a successful answer."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, _CLOSING + _fields(metadata))


def failure(
    stream: int,
    code: int,
    text: str,
    metadata: Iterable[tuple[str, str | bytes]] = (),
    opened: bool = False,
    resized: bool = False,
) -> bytes:
    """The end of a call that failed; its only frame, unless its answer was `opened`. `resized`: as for `opening`."""
    status = [("grpc-status", str(code)), ("grpc-message", _escaped(text)), *metadata]
    block = _RESIZED * resized + (b"" if opened else _OPENING) + _fields(status)
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block)


def _escaped(text: str) -> str:
    """A status text as gRPC has it, in ASCII; cut where it would fill a header."""
    found = quote(text, safe=_UNESCAPED)
    if len(found) > TEXT_BYTES:
        found = re.sub(r"%.?$", "", found[:TEXT_BYTES])
    return found


def no_grpc(stream: int, status: int) -> bytes:
    """HTTP's own refusal, of what is no call of gRPC."""
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x08\x03" + str(status).encode())


def data_frames(stream: int, payload: bytes, largest: int) -> bytes:
    """A payload as DATA frames of at most `largest` bytes."""
    if len(payload) <= largest:
        return frame(DATA, 0, stream, payload)
    pieces = [payload[i : i + largest] for i in range(0, len(payload), largest)]
    return b"".join([frame(DATA, 0, stream, piece) for piece in pieces])


def _fields(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """As literals that no table is to remember."""
    out = []
    for name, value in metadata:
        if isinstance(value, bytes):
            value = base64.b64encode(value).rstrip(b"=") if name.endswith("-bin") else value
        else:
            value = value.encode()
        out.append(b"\x00" + _length(len(name)) + name.encode("ascii") + _length(len(value)) + value)
    return b"".join(out)


def _length(size: int) -> bytes:
    """Of a text that follows, not in the Huffman code."""
    if size < 0x7F:
        return bytes([size])
    out = bytearray([0x7F])
    size -= 0x7F
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
