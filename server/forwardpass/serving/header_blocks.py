"""Header blocks of HTTP/2 requests (HPACK, RFC 7541) to what a gRPC call says of itself. Pure.

The library hpack takes 15 to 25 µs for a gRPC client's block, several times what the rest of a small request costs.
So the walk over a block is written out here, and a block that changes nothing in the table and was seen before is not
walked again: clients send the same one for every call, or one that differs in its timeout. hpack has the Huffman code.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections import deque
from collections.abc import Sequence
from typing import Final

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from forwardpass.serving.request import TIMINGS_KEY

STATIC: Final = HeaderTable.STATIC_TABLE
TABLE_SIZE: Final = 4096  # bytes of the dynamic table that a client may use: HTTP/2's default, which we leave as it is
ENTRY_OVERHEAD: Final = 32  # what an entry counts for beside its bytes
REMEMBERED: Final = 256  # blocks, a connection
REMEMBERED_BYTES: Final = 2048  # of the longest one remembered, as it is and as what it says
BINARIES: Final = 16  # values that one "-bin" field may have, with commas between them
UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# Not metadata: HTTP's own, and what gRPC says about the call itself.
RESERVED: Final = frozenset({b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"})

Fields = Sequence[tuple[bytes, bytes]]


class HeaderError(Exception):
    """A block is no HPACK: the connection's tables are out of step, and it has to go."""


class Head:
    """What a call's header block says. Shared by all calls of a connection that say the same."""

    __slots__ = ("encoding", "http_status", "metadata", "path", "problem", "sound", "timeout", "timings")

    def __init__(self, fields: Fields) -> None:
        self.path = method = content_type = b""
        self.timeout: float | None = None  # seconds
        self.encoding = b"identity"
        self.problem = ""  # what is wrong with it
        metadata: list[tuple[str, str | bytes]] = []
        for name, value in fields:
            if name == b":path":
                self.path = value
            elif name == b":method":
                method = value
            elif name == b"content-type":
                content_type = value
            elif name == b"grpc-timeout":
                self.timeout = _seconds(value)
                if self.timeout is None:
                    self.problem = "grpc-timeout: expected at most 8 digits and one of H, M, S, m, u, n"
            elif name == b"grpc-encoding":
                self.encoding = value
            elif name[:1] != b":" and name not in RESERVED:
                key = name.decode("ascii", "replace")
                if name[-4:] == b"-bin":
                    metadata += [(key, _binary(part)) for part in value.split(b",", BINARIES - 1)]
                else:
                    metadata.append((key, value.decode("utf-8", "replace")))
        self.metadata = tuple(metadata)
        self.timings = any(key == TIMINGS_KEY and value != "0" for key, value in metadata)
        # What HTTP answers to that which is no call of gRPC; 0: it is one.
        is_grpc = content_type.startswith(b"application/grpc") and content_type[16:17] in (b"", b"+", b";")
        self.http_status = 405 if method != b"POST" else 0 if is_grpc else 415
        self.sound = not self.problem and not self.http_status


# In place of what a block says, where it says more than it may.
OVERSIZED: Final = Head(())


class HeaderDecoder:
    """The decoding half of one connection's HPACK. Every block must pass through, in the order of arrival."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of one call's fields, counted as HTTP/2 does: names, values and 32 bytes each."""
        self._max = max_bytes
        self._table: deque[tuple[bytes, bytes]] = deque()  # the newest first
        self._size = 0
        self._limit = TABLE_SIZE
        self._heads: dict[bytes, Head] = {}

    def head(self, block: bytes) -> Head:
        """Of one whole block; OVERSIZED if it says more than it may. Raises HeaderError."""
        found = self._heads.get(block)
        if found is not None:
            return found
        fields, total, changed = self._fields(block)
        head = OVERSIZED if total > self._max else Head(fields)
        if changed:
            self._heads.clear()
        elif len(block) <= REMEMBERED_BYTES and total <= REMEMBERED_BYTES:
            if len(self._heads) >= REMEMBERED:
                self._heads.clear()
            self._heads[block] = head
        return head

    def skip(self, block: bytes) -> None:
        """A block that says nothing of interest. Raises HeaderError."""
        if self._fields(block)[2]:
            self._heads.clear()

    def _fields(self, block: bytes) -> tuple[list[tuple[bytes, bytes]], int, bool]:
        """Fields, their size, and whether the table is another one now."""
        fields: list[tuple[bytes, bytes]] = []
        table = self._table
        position, end, total, changed = 0, len(block), 0, False
        try:
            while position < end:
                first = block[position]
                if first & 0x80:  # an entry of the table
                    index = first & 0x7F
                    position += 1
                    if index == 0x7F:
                        index, position = _integer(block, position, 0x7F)
                    if index == 0:
                        raise HeaderError("index 0")
                    field = STATIC[index - 1] if index <= 61 else table[index - 62]
                elif first & 0xE0 == 0x20:  # a new size for the table
                    limit, position = _integer_from(block, position, 0x1F)
                    if limit > TABLE_SIZE or fields:
                        raise HeaderError(f"a table of {limit} bytes")
                    self._limit = limit
                    self._evict(0)
                    changed = True
                    continue
                else:
                    mask = 0x3F if first & 0x40 else 0x0F
                    index, position = _integer_from(block, position, mask)
                    if index:
                        name = STATIC[index - 1][0] if index <= 61 else table[index - 62][0]
                    else:
                        name, position = _text(block, position)
                    value, position = _text(block, position)
                    field = (name, value)
                    if first & 0x40:
                        self._add(field)
                        changed = True
                total += len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
                if total <= self._max:  # the table is to be kept in step; what is refused need not be kept
                    fields.append(field)
        except IndexError:
            raise HeaderError("it ends too early or names no entry") from None
        return fields, total, changed

    def _add(self, field: tuple[bytes, bytes]) -> None:
        size = len(field[0]) + len(field[1]) + ENTRY_OVERHEAD
        self._evict(size)
        if size <= self._limit:
            self._table.appendleft(field)
            self._size += size

    def _evict(self, more: int) -> None:
        """Make room for `more` bytes, if need be by leaving nothing."""
        table = self._table
        while table and self._size + more > self._limit:
            name, value = table.pop()
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD


def _integer_from(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """An integer whose first bits are those of `mask` at `position`, and where it ends."""
    value = block[position] & mask
    return _integer(block, position + 1, mask) if value == mask else (value, position + 1)


def _integer(block: bytes, position: int, value: int) -> tuple[int, int]:
    """The rest of an integer that did not fit its first byte."""
    for shift in (0, 7, 14, 21):
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise HeaderError("an integer beyond all use")


def _text(block: bytes, position: int) -> tuple[bytes, int]:
    coded = block[position] & 0x80
    length, position = _integer_from(block, position, 0x7F)
    end = position + length
    if end > len(block):
        raise IndexError
    text = block[position:end]
    return (_huffman(text) if coded else text), end


@functools.lru_cache(512)
def _huffman(text: bytes) -> bytes:
    try:
        return decode_huffman(text)
    except HPACKDecodingError:
        raise HeaderError("a text that is not in the Huffman code") from None


def _seconds(value: bytes) -> float | None:
    """grpc-timeout, as "20m"; None for what is none."""
    digits, unit = value[:-1], value[-1:].decode("latin-1")
    if not digits.isdigit() or len(digits) > 8 or unit not in UNITS:
        return None
    return int(digits) * UNITS[unit]


def _binary(value: bytes) -> bytes:
    """The value of a "-bin" key: base64, with or without padding."""
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        return b""
