"""The head of a gRPC call: what a request's header fields say about it. Pure.

Most calls need their path, deadline and encoding only, so metadata is decoded when somebody asks for it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

from forwardpass.protocol.timings import TIMINGS_KEY

BINARIES: Final = 16  # values that one "-bin" field may have, with commas between them
ENTRY_OVERHEAD: Final = 32  # bytes that a field counts for beside its name and value (RFC 9113, 10.5.1)
UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Not metadata: HTTP's own fields, and what gRPC says about the call itself.
RESERVED: Final = frozenset({b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"})

Fields = tuple[tuple[bytes, bytes], ...]
Metadata = tuple[tuple[str, str | bytes], ...]

_TIMINGS: Final = TIMINGS_KEY.encode()
# Fields that say something about the call itself, and those of them that every call has.
TELLING_ALWAYS: Final = frozenset({b":path", b":method", b"content-type"})
TELLING: Final = TELLING_ALWAYS | {b"grpc-timeout", b"grpc-encoding", _TIMINGS}


class RequestHead:
    """One call's header fields, read."""

    # Most calls have these.
    timeout: float | None = None  # seconds
    encoding = b"identity"
    timings = False  # whether the caller asks for the timings
    problem = ""  # why the call fails whatever its message is; empty: nothing
    http_status = 0  # of the answer to a request that is no gRPC call; 0: it is one
    _metadata: Metadata | None = None

    def __init__(self, fields: Fields) -> None:
        """`fields`: as the HTTP/2 library delivers them, each checked by HTTP's own rules."""
        self.fields = fields
        self.nbytes = size_of(fields)
        named = dict(fields)  # of repeated fields the last; only metadata may repeat
        self.path = named.get(b":path", b"")
        if named.get(b":method") != b"POST" or named.get(b"content-type") != b"application/grpc":
            self.http_status = _http_status(named)
        if b"grpc-timeout" in named:
            self.set_timeout(named[b"grpc-timeout"])
        if b"grpc-encoding" in named:
            self.encoding = named[b"grpc-encoding"]
        if _TIMINGS in named:
            self.timings = named[_TIMINGS] != b"0"

    def set_timeout(self, value: bytes) -> None:
        """Read a grpc-timeout."""
        self.timeout = seconds(value)
        malformed = self.timeout is None
        self.problem = "grpc-timeout: expected at most 8 digits and one of H, M, S, m, u, n" if malformed else ""

    @property
    def metadata(self) -> Metadata:
        """(key, value) of the caller's metadata; bytes for keys that end with "-bin"."""
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
        """The value of one field as it came; empty where it is missing."""
        return dict(self.fields).get(name, b"")


class HeadReader:
    """Reads the heads of one connection's calls, in a third of the time where they are alike.

    From call to call a client's fields are the same but for a few in one stretch: a deadline, a trace. What those
    before and behind say is kept, and only the stretch is looked at. The heads are those that `RequestHead` reads.
    """

    def __init__(self) -> None:
        self._before: Fields = ()  # the fields that the calls begin with
        self._behind: Fields = ()  # and those they end with
        self._begin = self._end = 0  # of the stretch between
        self._count = 0  # fields of the calls that this is about; 0: of none
        self._said: dict[str, Any] = {}  # by the fields before and behind
        self._stretch: Fields = ()  # of the last call
        self._last = RequestHead(())  # its head

    def read(self, fields: Fields) -> RequestHead:
        """The head of a call with these fields; the last one's, if they are the same."""
        if len(fields) == self._count:
            begin, end = self._begin, self._end
            if fields[:begin] == self._before and fields[end:] == self._behind:
                stretch = fields[begin:end]
                if stretch == self._stretch:
                    return self._last
                head = RequestHead.__new__(RequestHead)
                head.__dict__.update(self._said)
                head.fields = fields
                for name, value in stretch:
                    head.nbytes += len(name) + len(value) + ENTRY_OVERHEAD
                    if name == b"grpc-timeout":
                        head.set_timeout(value)
                    elif name in TELLING:
                        return RequestHead(fields)
                self._stretch, self._last = stretch, head
                return head
        head = RequestHead(fields)
        self._learn(head)
        return head

    def _learn(self, head: RequestHead) -> None:
        """See what a call has in common with the last one."""
        last, fields = self._last.fields, head.fields
        count = self._count = len(fields)
        differ = [i for i in range(count) if fields[i] != last[i]] if len(last) == count else []
        # Where nothing differs, or nothing can be compared: as if all were the same, until one says otherwise.
        self._begin, self._end = (differ[0], differ[-1] + 1) if differ else (count, count)
        self._before, self._behind = fields[: self._begin], fields[self._end :]
        self._stretch, self._last = fields[self._begin : self._end], head
        common = self._before + self._behind
        names = {name for name, _ in common}
        if not names >= TELLING_ALWAYS or (differ and b"grpc-timeout" in names):
            self._count = 0
        self._said = vars(RequestHead(common)).copy()


def _http_status(named: Mapping[bytes, bytes]) -> int:
    if named.get(b":method") != b"POST":
        return 405
    content = named.get(b"content-type", b"")
    is_grpc = content.startswith(b"application/grpc") and content[16:17] in (b"", b"+", b";")
    return 0 if is_grpc else 415


def size_of(fields: Fields) -> int:
    """What header fields count for, as SETTINGS_MAX_HEADER_LIST_SIZE counts them."""
    return sum([len(name) + len(value) for name, value in fields]) + ENTRY_OVERHEAD * len(fields)


def seconds(value: bytes) -> float | None:
    """grpc-timeout, such as b"20m", in seconds; None where it is malformed."""
    digits, unit = value[:-1], UNITS.get(value[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        return None
    return int(digits) * unit


def binary(value: bytes) -> bytes:
    """The value of a "-bin" key: base64, with or without padding; empty where it is malformed."""
    value = value.strip()
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        return b""
