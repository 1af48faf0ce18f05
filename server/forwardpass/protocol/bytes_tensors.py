"""BYTES elements as raw contents: each preceded by its length in four little-endian bytes. Pure.

Elements come by the million. Lengths are read one by one, or at once where they are equal; all other work is done on
all elements at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<I")
_SAME_FROM: Final = 64  # elements from which it is worth looking whether all have the same length

Offsets = Sequence[int] | NDArray[np.int64]


def pack(elements: Iterable[bytes]) -> bytes:
    """The elements as raw contents."""
    found = list(elements)
    lengths = np.fromiter(map(len, found), "<u4", len(found)).tobytes()
    parts: list[bytes] = [b""] * (2 * len(found))
    parts[::2] = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    parts[1::2] = found
    return b"".join(parts)


def ends(data: bytes | memoryview, most: int) -> Offsets:
    """Where each element of raw contents ends; an element begins four bytes behind the end of the one before.

    Stops after `most` elements and one more. Raises ValueError if one reaches beyond the end.
    """
    size = _LENGTH.size
    end = len(data)
    if end >= _SAME_FROM * size:
        stride = size + _LENGTH.unpack_from(data)[0]
        count, rest = divmod(end, stride)
        if not rest and count >= _SAME_FROM:
            rows = np.frombuffer(data, np.uint8).reshape(count, stride)[:, :size]
            if (rows == rows[0]).all():
                stops: NDArray[np.int64] = np.arange(1, min(count, most + 1) + 1, dtype=np.int64) * stride
                return stops
    read_length = _LENGTH.unpack_from
    found: list[int] = []
    add = found.append
    at, last = 0, end - size
    while at <= last:
        (length,) = read_length(data, at)
        stop = at + size + length
        if stop > end:
            raise ValueError(f"element {len(found)} claims {length} bytes, {end - at - size} are left")
        add(stop)
        at = stop
        if len(found) > most:
            return found
    if at < end:
        raise ValueError(f"element {len(found)} has {end - at} bytes of its {size}-byte length")
    return found


def cut(data: bytes, stops: Offsets) -> list[bytes]:
    """The elements that end at these offsets."""
    listed = np.asarray(stops, np.int64)
    starts = np.empty_like(listed)
    starts[:1] = 0
    starts[1:] = listed[:-1]
    starts += _LENGTH.size
    return [data[start:stop] for start, stop in zip(starts.tolist(), listed.tolist(), strict=True)]


def are_text(data: bytes | memoryview, stops: Offsets) -> bool:
    """Whether each of the elements that end at these offsets is UTF-8."""
    whole = bytes(data)
    if whole.isascii():
        return True
    # With a blank for every byte of a length, no character can reach from one element into the next.
    blanked = np.frombuffer(whole, np.uint8).copy()
    begins = np.concatenate(([0], np.asarray(stops, np.int64)[:-1]))
    for i in range(_LENGTH.size):
        blanked[begins + i] = 0x20
    try:
        str(blanked, "utf-8")  # type: ignore[call-overload]  # which takes any buffer
    except UnicodeDecodeError:
        return False
    return True


def unpack(data: bytes | memoryview) -> list[bytes]:
    """The elements of raw contents, in order. Raises ValueError if one reaches beyond the end."""
    return cut(bytes(data), ends(data, len(data)))
