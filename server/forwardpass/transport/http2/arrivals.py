"""What was read off sockets and not yet processed, and since when it may have waited. Pure: the clock is passed in.

Past a server's capacity, calls wait where nothing sees them: in the sockets. So everything a socket has is read at
once, which takes a fraction of a microsecond a call, and kept here with a time. A call's age is then known before
anything was spent on it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from forwardpass.transport.http2.peer import Peer

MOST: Final = 1 << 20  # bytes kept of one client; beyond that nothing more is read from it
PROMPT: Final = 50e-6  # seconds: a poll that returns within them did not wait for what it found


class Arrivals:
    """Bytes in the order in which they were read. For one thread.

    `since` is the time by which bytes that are read now can't have been there: the end of the previous poll, at which
    their socket was empty, or now if the poll has just waited for them.
    """

    def __init__(self, now: float) -> None:
        self.since = self.now = self._polled = now  # `now`: the latest poll's end
        self._waiting: deque[tuple[Peer, bytes, float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def polled(self, began: float, ended: float) -> None:
        """A poll took from `began` to `ended`."""
        self.since = ended if ended - began > PROMPT else self._polled
        self._polled = self.now = ended

    def add(self, peer: Peer, data: bytes) -> None:
        """Keep what was read from a client; b"": it sends no more."""
        peer.unprocessed += len(data)
        self._waiting.append((peer, data, self.since))

    def take(self) -> tuple[Peer, bytes, float]:
        """The oldest bytes, and since when they may have waited. Raises IndexError if there are none."""
        found = self._waiting.popleft()
        found[0].unprocessed -= len(found[1])
        return found

    def hold(self, peer: Peer, data: bytes, since: float) -> None:
        """Keep taken bytes of a client that must first take what it is owed."""
        peer.unprocessed += len(data)
        peer.held.append((data, since))

    def resume(self, peer: Peer) -> None:
        """Process next what was held of a client, and what is held no longer."""
        held, peer.held = peer.held, []
        self._waiting.extendleft((peer, data, since) for data, since in reversed(held))
