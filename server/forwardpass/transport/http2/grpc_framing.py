"""Parses gRPC's length-prefixed messages from the bytes of a call as they arrive, each within a bound. Pure."""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from forwardpass.errors import RequestError, RunFailed, TooLarge, UnknownMethod

MESSAGE_STRUCT: Final = struct.Struct(">BI")  # the prefix of every message: whether it is compressed, its length

INFLATED_LATER: Final = 1024  # bytes of a compressed message, which may become a thousand times as many

# The compressions that a client may use, with zlib's `wbits` for each.
COMPRESSIONS: Final = {b"gzip": 31, b"deflate": 15}


class DeflatedMessage:
    """A compressed message that is not inflated yet (`PackedMessage`)."""

    __slots__ = ("_data", "_encoding", "_most")

    def __init__(self, data: bytes, encoding: bytes, most: int) -> None:
        self._data, self._encoding, self._most = data, encoding, most

    def __len__(self) -> int:
        return len(self._data)

    def inflate(self) -> bytes:
        """Raises as `take_message` does."""
        return _inflated(self._data, self._encoding, self._most)


class FramedMessage(NamedTuple):
    message: bytes | DeflatedMessage
    size: int  # bytes that it took up in the call's data, its prefix included


def take_message(parts: bytearray, encoding: bytes, most: int) -> FramedMessage | None:
    """Remove and return the first message of `parts`; None while it is incomplete. A large one is not inflated yet.

    Raises TooLarge for one of more than `most` bytes, by its claimed length or once inflated, which stops there;
    RunFailed or UnknownMethod for one whose compression is invalid or unsupported.
    """
    if len(parts) < 5:
        return None
    compressed, size = MESSAGE_STRUCT.unpack_from(parts)
    if size > most:
        raise TooLarge(f"the message has {size} bytes, the limit is {most}")
    end = size + 5
    if len(parts) < end:
        return None
    data = bytes(memoryview(parts)[5:end])
    del parts[:end]
    if not compressed:
        return FramedMessage(data, end)
    if size >= INFLATED_LATER and encoding in COMPRESSIONS:
        return FramedMessage(DeflatedMessage(data, encoding, most), end)
    return FramedMessage(_inflated(data, encoding, most), end)


def _inflated(data: bytes, encoding: bytes, most: int) -> bytes:
    if encoding == b"identity":
        raise RunFailed("a compressed message without grpc-encoding")
    if encoding not in COMPRESSIONS:
        raise UnknownMethod("grpc-encoding: expected identity, gzip or deflate")
    inflater = zlib.decompressobj(COMPRESSIONS[encoding])
    broken: RequestError = RunFailed("a message that cannot be inflated")
    try:
        found = inflater.decompress(data, most + 1)
    except zlib.error:
        raise broken from None
    if len(found) > most:
        raise TooLarge(f"the message has more than {most} bytes once it is inflated")
    if not inflater.eof:
        raise broken
    return found
