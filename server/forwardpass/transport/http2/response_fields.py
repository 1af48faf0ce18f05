"""The header fields of gRPC responses: the opening, and the trailers with status and metadata. Pure."""

from __future__ import annotations

import base64
import re
from typing import Final
from urllib.parse import quote

from forwardpass.transport.interface import Metadata

Fields = tuple[tuple[bytes, bytes], ...]

OPENING: Final[Fields] = ((b":status", b"200"), (b"content-type", b"application/grpc"))
SUCCESS: Final[Fields] = ((b"grpc-status", b"0"),)
TEXT_BYTES: Final = 4096  # of a status text, at most: every client accepts that much metadata
_UNESCAPED: Final = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # in addition to letters and digits


def success(metadata: Metadata) -> Fields:
    """The trailers of a call that succeeded."""
    return SUCCESS + _encoded(metadata)


def failure(code: int, text: str, metadata: Metadata) -> Fields:
    """The trailers of a call that failed."""
    status = ((b"grpc-status", str(code).encode()), (b"grpc-message", escaped(text).encode()))
    return status + _encoded(metadata)


def http_failure(status: int) -> Fields:
    """The whole response to a request that is not a gRPC call."""
    return ((b":status", str(status).encode()),)


def escaped(text: str) -> str:
    """Percent-encode a status text as gRPC specifies, cut to TEXT_BYTES."""
    found = quote(text, safe=_UNESCAPED)
    if len(found) > TEXT_BYTES:
        found = re.sub(r"%.?$", "", found[:TEXT_BYTES])
    return found


def _encoded(metadata: Metadata) -> Fields:
    found = []
    for name, value in metadata:
        if isinstance(value, bytes):
            value = base64.b64encode(value).rstrip(b"=") if name.endswith("-bin") else value
        else:
            value = value.encode()
        found.append((name.encode("ascii"), value))
    return tuple(found)
