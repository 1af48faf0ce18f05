"""One HTTP request as the handler of its RPC sees it (`CallContext`): one message in, one out, no stream."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Final

from forwardpass.errors import InvalidRequest, printable
from forwardpass.transport.interface import Metadata
from forwardpass.transport.memory_budget import Share

TIMEOUT_HEADER: Final = b"x-request-timeout"
_TIMEOUT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s|)")
_UNITS: Final = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI has them: names in lower case


class RestCallContext:
    """The call of one RPC with one message. The trailers that its handler sets become response headers."""

    def __init__(self, headers: Headers, deadline: float | None, message: bytes, share: Share) -> None:
        """`deadline` on the monotonic clock; None: there is none."""
        self.share = share
        self._headers = headers
        self._deadline = deadline
        self._message: bytes | None = message
        self.trailers: Metadata = ()

    @property
    def metadata(self) -> Metadata:
        return metadata_of(self._headers)

    @property
    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def read(self) -> bytes | None:
        message, self._message = self._message, None
        return message

    async def write(self, _message: bytes) -> None:
        raise AssertionError("an RPC with a stream has no REST form")

    def set_trailers(self, trailers: Metadata) -> None:
        self.trailers = trailers


def metadata_of(headers: Headers) -> Metadata:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def deadline_of(headers: Headers) -> float | None:
    """The deadline that X-Request-Timeout asks for, on the monotonic clock. Raises InvalidRequest if it is not one."""
    for name, value in headers:
        if name == TIMEOUT_HEADER:
            text = value.decode("latin-1").strip()
            found = _TIMEOUT.fullmatch(text)
            if found is None:
                raise InvalidRequest(
                    f"X-Request-Timeout: expected seconds, or a number with s, ms or us, got '{printable(text)}'"
                )
            return time.monotonic() + float(found[1]) * _UNITS[found[2]]
    return None
