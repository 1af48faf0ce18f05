"""What to do with calls that waited unread: how old they may be, and how the engine rejects many at once.

A server that reads more than it can serve answers everything late, and even a rejection costs a third of a small
network's call where each is parsed, looked at and answered here. HTTP/2 has a cheaper one: calls beyond
SETTINGS_MAX_CONCURRENT_STREAMS, which libnghttp2 rejects by itself with REFUSED_STREAM, for a twentieth. While overdue
bytes are processed that limit is 0; afterwards it is as before. Clients may know that such a call was not looked at and
can be repeated (RFC 9113, 8.7); gRPC's C core does not repeat it, and reports UNAVAILABLE.
"""

from __future__ import annotations

import struct
from typing import Final

from ngh2 import Connection as Engine

from forwardpass.transport.http2.send_side import REFUSED_STREAM

MAX_CONCURRENT_STREAMS: Final = 3  # the setting's number
# A call that waited unread is rejected if less than MARGIN seconds of its time are left, and less than MARGIN_SHARE of
# what it waited: what is served must have time for it. Past the capacity every call is read that late.
MARGIN: Final = 20e-3
MARGIN_SHARE: Final = 1 / 3
TURN: Final = 5e-3  # seconds that processing may take: what is late by its end would be read for nothing
LEAST: Final = 20e-3  # seconds that a connection's calls may wait at least: shorter stalls are no overload
# The frame that sets the limit, without the limit: a length of 6, SETTINGS, no flags, no stream, the setting's number.
FRAME: Final = b"\0\0\6\4\0" + bytes(4) + MAX_CONCURRENT_STREAMS.to_bytes(2, "big")

HEAD: Final = struct.Struct(">I")  # a frame's length and kind
RESET: Final = 4 << 8 | 3  # of RST_STREAM


def is_late(left: float, unread: float) -> bool:
    """Whether a call with `left` seconds to its deadline has waited for too long, which is `unread` seconds."""
    return left < MARGIN and left < unread * MARGIN_SHARE


class Patience:
    """For how long the calls of one connection may wait unread: as the most patient of its latest calls."""

    def __init__(self, without_deadline: float) -> None:
        """`without_deadline`: seconds for calls that have none."""
        self._without_deadline = without_deadline
        self._latest = self._before = 0.0

    def note(self, timeout: float) -> None:
        """The longest timeout of a group of calls, in seconds."""
        if timeout > self._latest:
            self._latest = timeout

    def roll(self) -> None:
        """Forget what was noted before the last call of this, unless nothing has been since."""
        if self._latest:
            self._before, self._latest = self._latest, 0.0

    @property
    def seconds(self) -> float:
        """What has waited for longer is too late whatever it is."""
        longest = max(self._latest, self._before) or self._without_deadline
        return max(LEAST, longest - min(MARGIN, longest * MARGIN_SHARE / (1 + MARGIN_SHARE)) - TURN)


def set_limit(engine: Engine, streams: int) -> bool:
    """Set how many calls the engine accepts at a time, without telling the client. False: it can't be done now.

    The engine applies a limit to what arrives from the moment on that it is queued as a setting. The frame is taken out
    before it leaves, so the client never hears of it, and need not obey or acknowledge what ends a moment later: some
    have calls on their way that they would send after their acknowledgement, against HTTP/2's rules.
    """
    if engine.want_write:
        return False
    engine.update_settings({MAX_CONCURRENT_STREAMS: streams})
    frame = take_all(engine)
    assert frame[:-4] == FRAME, frame
    return True


def take_all(engine: Engine) -> bytes:
    """All that the engine would send now."""
    found = b""
    while data := engine.data_to_send(1 << 20):
        found += data
    return found


def rejections(sent: bytes) -> int:
    """How many calls the engine rejects in frames that it sends."""
    count = at = 0
    while at < len(sent):
        word = HEAD.unpack_from(sent, at)[0]
        count += word == RESET and sent[at + 12] == REFUSED_STREAM
        at += 9 + (word >> 8)
    return count
