"""BYTES elements as raw contents: each preceded by its length in four little-endian bytes. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import overload

_LENGTH = struct.Struct("<I")


def pack(elements: Iterable[bytes]) -> bytes:
    """The elements as raw contents."""
    parts: list[bytes] = []
    for element in elements:
        parts += (_LENGTH.pack(len(element)), element)
    return b"".join(parts)


@overload
def unpack(data: bytes) -> Iterator[bytes]: ...
@overload
def unpack(data: bytes | memoryview) -> Iterator[bytes | memoryview]: ...
def unpack(data: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """The elements of raw contents, in order. Raises ValueError if one reaches beyond the end."""
    read_length = _LENGTH.unpack_from
    start, end, count = _LENGTH.size, len(data), 0  # start: of an element, after its length
    while start <= end:
        (length,) = read_length(data, start - _LENGTH.size)
        stop = start + length
        if stop > end:
            raise ValueError(f"element {count} claims {length} bytes, {end - start} are left")
        yield data[start:stop]
        start = stop + _LENGTH.size
        count += 1
    left = end - (start - _LENGTH.size)
    if left:
        raise ValueError(f"element {count} has {left} bytes of its {_LENGTH.size}-byte length")
