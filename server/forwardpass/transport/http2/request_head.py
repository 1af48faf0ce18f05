"""The head of a gRPC call, parsed from a request's header fields. Pure.

Most calls need only their path, deadline and encoding, so metadata is decoded on demand.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Final

from forwardpass.protocol.timings import TIMINGS_KEY
from forwardpass.transport.http2.response_fields import Fields
from forwardpass.transport.interface import Metadata

BINARIES: Final = 16  # comma-separated values that one "-bin" field may have
ENTRY_OVERHEAD: Final = 32  # bytes counted for a field in addition to its name and value (RFC 9113, 10.5.1)
UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Not metadata: HTTP's own fields, and those that describe the gRPC call itself.
RESERVED: Final = frozenset({b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"})

_TIMINGS: Final = TIMINGS_KEY.encode()


class RequestHead:
    """One call's header fields, parsed."""

    # Defaults, which most calls keep.
    timeout: float | None = None  # seconds
    encoding = b"identity"
    timings = False  # whether the caller asks for the timings
    traceparent = b""
    problem = ""  # the reason to reject the call whatever its message is; empty: none
    http_status = 0  # of the response to a request that is not a gRPC call; 0: it is one
    _metadata: Metadata | None = None

    def __init__(self, fields: Fields) -> None:
        """`fields`: as the HTTP/2 library delivers them, each already checked against HTTP's rules."""
        self.fields = fields
        named = dict(fields)  # the last of repeated fields; only metadata may repeat
        # Counted as for SETTINGS_MAX_HEADER_LIST_SIZE.
        if len(named) == len(fields):  # without a loop in Python
            self.nbytes = sum(map(len, named)) + sum(map(len, named.values())) + ENTRY_OVERHEAD * len(fields)
        else:
            self.nbytes = sum([len(name) + len(value) + ENTRY_OVERHEAD for name, value in fields])
        self.path = named.get(b":path", b"")
        if named.get(b":method") != b"POST" or named.get(b"content-type") != b"application/grpc":
            self.http_status = _http_status(named)
        if b"grpc-timeout" in named:
            self.timeout = seconds(named[b"grpc-timeout"])
            if self.timeout is None:
                self.problem = "grpc-timeout: expected at most 8 digits and one of H, M, S, m, u, n"
        if b"grpc-encoding" in named:
            self.encoding = named[b"grpc-encoding"]
        if b"traceparent" in named:
            self.traceparent = named[b"traceparent"]
        if _TIMINGS in named:
            self.timings = named[_TIMINGS] != b"0"

    @property
    def metadata(self) -> Metadata:
        """(key, value) pairs of the caller's metadata; bytes values for keys that end with "-bin"."""
        if self._metadata is None:
            found: list[tuple[str, str | bytes]] = []
            for name, value in self.fields:
                if name[:1] == b":" or name in RESERVED:
                    continue
                key = name.decode("ascii", "replace")
                if name.endswith(b"-bin"):
                    found += [(key, binary(part)) for part in value.split(b",", BINARIES - 1)]
                else:
                    found.append((key, value.decode("utf-8", "replace")))
            self._metadata = tuple(found)
        return self._metadata

    def field(self, name: bytes) -> bytes:
        """The raw value of one field; empty if it is missing."""
        return dict(self.fields).get(name, b"")


def _http_status(named: Mapping[bytes, bytes]) -> int:
    if named.get(b":method") != b"POST":
        return 405
    content = named.get(b"content-type", b"")
    is_grpc = content.startswith(b"application/grpc") and content[16:17] in (b"", b"+", b";")
    return 0 if is_grpc else 415


def seconds(value: bytes) -> float | None:
    """Parse a grpc-timeout, such as b"20m", into seconds; None if it is malformed."""
    digits, unit = value[:-1], UNITS.get(value[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        return None
    return int(digits) * unit


def binary(value: bytes) -> bytes:
    """Decode the value of a "-bin" key from base64, with or without padding; empty if it is malformed."""
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        return b""
