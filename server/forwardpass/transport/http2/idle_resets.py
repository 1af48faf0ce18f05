"""Removes RST_STREAM frames of streams that were never opened from a client's bytes. Pure.

gRPC's C core before 1.85 sends them: a call that is cancelled before its HEADERS were flushed has a stream number but
no stream. In HTTP/2 that is a connection error, which would end every other call on the connection. So for those
clients the frames are inspected before libnghttp2 gets them; for all others they are not.
"""

from __future__ import annotations

import re
import struct
from typing import Final

_HEAD: Final = struct.Struct(">IBI")  # (length << 8 | type, flags, stream)
_PREFACE: Final = 24  # bytes before the first frame
_HEADERS: Final = 1
_RST_STREAM: Final = 3
_STREAM: Final = 0x7FFFFFFF
_C_CORE: Final = re.compile(rb"grpc-c/(\d+)\.")
FIXED_IN: Final = 58  # the gRPC core of grpcio 1.85, the first that does not send them
STRAY_RESETS: Final = 1024  # frames removed from one connection, beyond one for each stream it could have opened


def needed(user_agent: bytes) -> bool:
    """Whether a client with this user agent sends such frames."""
    found = _C_CORE.search(user_agent)
    return found is not None and int(found[1]) < FIXED_IN


class IdleResets:
    """Follows one connection's frames from its first byte on."""

    def __init__(self) -> None:
        self.removed = 0
        self._skip = _PREFACE  # bytes until the next frame's head
        self.kept = b""  # the beginning of a frame whose rest has not arrived
        self._last = 0  # the highest stream number seen in HEADERS

    def filter(self, data: bytes) -> bytes:
        """Return `data` without those frames; the beginning of a frame at its end may be kept for the next call."""
        if self.kept:
            data = self.kept + data
            self.kept = b""
        position, end = self._skip, len(data)
        parts: list[bytes] = []
        start = 0  # of the next part to pass on
        while end - position >= 9:
            word, _, stream = _HEAD.unpack_from(data, position)
            kind, following = word & 0xFF, position + 9 + (word >> 8)
            if kind == _HEADERS:
                self._last = max(self._last, stream & _STREAM)
            elif kind == _RST_STREAM and word >> 8 == 4 and self._is_idle(stream & _STREAM):
                if following > end:
                    break
                parts.append(data[start:position])
                start = following
                self.removed += 1
            position = following
        if position < end:  # less than a head, or an incomplete frame that must be removed
            self.kept = data[position:]
            end = position
        self._skip = max(position - end, 0)
        parts.append(data[start:end] if start or end < len(data) else data)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def _is_idle(self, stream: int) -> bool:
        return stream & 1 == 1 and stream > self._last and self.removed < STRAY_RESETS + self._last // 2
