"""gRPC's headers as HPACK blocks, without a dynamic table: requests to bytes, answers to a status. Pure.

We announce a header table of size 0 and index nothing ourselves, so each block stands alone and equal bytes mean equal
headers: what a block said is remembered by its bytes. Of an answer's headers only the status and its text are read.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

from forwardpass.errors import LoadTestError

MAX_REMEMBERED = 4096  # blocks; a refusal's text may differ each time

_STATIC_NAMES = 61
_STATUS_NAME = range(8, 15)  # entries of the static table whose name is :status
_STATUS_VALUES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}

# HPACK's Huffman code is canonical: the symbols by length of their codes define it. Those that a status or a
# percent-encoded text can have; the longer codes stand for bytes that are not printable (and the backslash).
_SYMBOLS = {
    5: "012aceiost",
    6: " %-./3456789=A_bdfghlmnpru",
    7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: "&*,;XZ",
    10: '!"()?',
    11: "'+|",
    12: "#>",
    13: "\0$@[]~",
    14: "^}",
    15: "<`{",
}


class HeaderError(LoadTestError):
    """A header block is not HPACK, or refers to a table that was announced as empty."""


class Text(NamedTuple):
    """A string as it came; read only where somebody wants it."""

    data: bytes
    is_huffman: bool

    def read(self) -> str:
        """The text, percent-decoded; a character that cannot be read ends it with an ellipsis."""
        return unquote(_from_huffman(self.data) if self.is_huffman else self.data.decode("latin-1"))


class SentHeaders(NamedTuple):
    """What a block said."""

    http: int | None  # :status; absent from trailers
    grpc: int | None  # grpc-status
    message: Text | None  # grpc-message


def request_block(
    path: str, authority: str, timeout_us: int | None, metadata: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """The headers of a call. Raises ValueError for a header that is too long for this encoder."""
    fields = [b"\x83\x86"]  # :method POST, :scheme http, from the static table
    pairs = [(":path", path), (":authority", authority), ("te", "trailers"), ("content-type", "application/grpc")]
    fields += [_literal(name, value) for name, value in (*pairs, *metadata)]
    if timeout_us is not None:
        fields.append(_literal("grpc-timeout", timeout_text(timeout_us)))  # last, and always of one length
    return b"".join(fields)


def timeout_text(microseconds: int) -> str:
    """A deadline as grpc-timeout has it, always of nine characters; at least 1 µs, at most 99 s."""
    return f"{min(max(microseconds, 1), 99_999_999):08d}u"


def _literal(name: str, value: str) -> bytes:
    encoded = value.encode()
    if len(name) > 126 or len(encoded) > 16382:
        raise ValueError(f"a header of more than 16382 bytes, or with a name of more than 126: {name}")
    size = bytes([len(encoded)]) if len(encoded) < 127 else b"\x7f" + _tail(len(encoded) - 127)
    return b"\x00" + bytes([len(name)]) + name.encode() + size + encoded


def _tail(number: int) -> bytes:
    found = bytearray()
    while number >= 128:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


class Reader:
    """Reads the blocks of answers, remembering what each one said."""

    def __init__(self) -> None:
        self._seen: dict[bytes, SentHeaders] = {}

    def read(self, block: bytes) -> SentHeaders:
        """Raises HeaderError."""
        said = self._seen.get(block)
        if said is None:
            said = _read(block)
            if len(self._seen) >= MAX_REMEMBERED:
                self._seen.clear()
            self._seen[block] = said
        return said


def _read(block: bytes) -> SentHeaders:
    http = grpc = message = None
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:  # an entry of the table
                index, at = _integer(block, at, 7)
                _check(index)
                http = _STATUS_VALUES.get(index, http)
                continue
            if first & 0xE0 == 0x20:  # a change of the table's size
                _, at = _integer(block, at, 5)
                continue
            index, at = _integer(block, at, 6 if first & 0x40 else 4)
            name = None
            if index:
                _check(index)
            else:
                text, at = _string(block, at)
                name = _NAMES.get(text)
            value, at = _string(block, at)
            if index in _STATUS_NAME:
                http = int(value.read())
            elif name == "grpc-status":
                grpc = int(value.read())
            elif name == "grpc-message":
                message = value
    except (IndexError, ValueError) as error:
        raise HeaderError(f"the server sent a header block that is not HPACK: {block[:60]!r}: {error}") from None
    return SentHeaders(http, grpc, message)


def _check(index: int) -> None:
    if index > _STATIC_NAMES:
        raise HeaderError("the server indexes its headers in a table that was announced to be empty")


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    number = block[at] & most
    at += 1
    if number < most:
        return number, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        number += (byte & 0x7F) << shift
        if byte < 128:
            return number, at
        shift += 7


def _string(block: bytes, at: int) -> tuple[Text, int]:
    is_huffman = bool(block[at] & 0x80)
    size, at = _integer(block, at, 7)
    if at + size > len(block):
        raise ValueError(f"a string of {size} bytes reaches beyond the end")
    return Text(block[at : at + size], is_huffman), at + size


def _codes() -> dict[tuple[int, int], str]:
    """(length, code): symbol."""
    found: dict[tuple[int, int], str] = {}
    code = last = 0
    for length, symbols in _SYMBOLS.items():
        code <<= length - last
        last = length
        for symbol in symbols:
            found[length, code] = symbol
            code += 1
    return found


_CODES = _codes()
_LONGEST = max(_SYMBOLS)
_BY_SYMBOL = {symbol: key for key, symbol in _CODES.items()}


def _from_huffman(data: bytes) -> str:
    bits = int.from_bytes(data, "big")
    left = 8 * len(data)
    found: list[str] = []
    while left > 0:
        for length in range(5, min(left, _LONGEST) + 1):
            symbol = _CODES.get((length, bits >> (left - length)))
            if symbol is not None:
                found.append(symbol)
                left -= length
                bits &= (1 << left) - 1
                break
        else:
            if left < 8 and bits == (1 << left) - 1:
                break  # the padding
            found.append("…")
            break
    return "".join(found)


def huffman(text: str) -> bytes:
    """`text` in HPACK's code, padded; its characters are those above. KeyError for another."""
    bits = size = 0
    for symbol in text:
        length, code = _BY_SYMBOL[symbol]
        bits = bits << length | code
        size += length
    padding = -size % 8
    return (bits << padding | (1 << padding) - 1).to_bytes((size + padding) // 8, "big")


_NAMES = {
    Text(data, is_huffman): name
    for name in ("grpc-status", "grpc-message")
    for data, is_huffman in ((name.encode(), False), (huffman(name), True))
}
