"""What was read off sockets and not yet processed, and since when it may have waited. Pure: the clock is passed in.

Past a server's capacity, calls wait where nothing sees them: in the sockets. So everything a socket has is read at
once, which takes a fraction of a microsecond a call, and kept here with a time. A call's age is then known before
anything was spent on it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from forwardpass.transport.http2.peer import Peer

MOST: Final = 1 << 24  # bytes kept of one client; beyond that nothing more is read from it
MOST_OF_ALL: Final = 1 << 26  # bytes; beyond that a client is read from when nothing of it is left
PROMPT: Final = 50e-6  # seconds: a poll that returns within them did not wait for what it found


class Arrivals:
    """Each client's bytes in the order in which they were read; clients take turns. For one thread.

    `since` is the time by which bytes that are read now can't have been there: the end of the previous poll, at which
    their socket was empty, or now if the poll has just waited for them.
    """

    def __init__(self, now: float) -> None:
        self.since = self.now = self._polled = now  # `now`: the latest poll's end
        self._nbytes = 0  # of all clients
        self._turns: deque[Peer] = deque()  # clients of which something may be taken

    def __bool__(self) -> bool:
        return bool(self._turns)

    def has_room(self, peer: Peer) -> bool:
        """Whether more may be read from a client."""
        return not peer.unprocessed or (peer.unprocessed < MOST and self._nbytes < MOST_OF_ALL)

    def polled(self, began: float, ended: float) -> None:
        """A poll took from `began` to `ended`."""
        self.since = ended if ended - began > PROMPT else self._polled
        self._polled = self.now = ended

    def add(self, peer: Peer, data: bytes) -> None:
        """Keep what was read from a client; b"": it sends no more."""
        self._count(peer, len(data))
        peer.arrivals.append((data, self.since))
        if len(peer.arrivals) == 1:
            self._turns.append(peer)

    def take(self) -> tuple[Peer, bytes, float]:
        """The next client's oldest bytes, and since when they may have waited. Raises IndexError if there are none."""
        peer = self._turns.popleft()
        data, since = peer.arrivals.popleft()
        self._count(peer, -len(data))
        if peer.arrivals:
            self._turns.append(peer)
        return peer, data, since

    def hold(self, peer: Peer, data: bytes, since: float) -> None:
        """Keep taken bytes of a client that must first take what it is owed; it has no turns until it is resumed."""
        self._count(peer, len(data))
        if peer.arrivals:
            self._turns.remove(peer)
        peer.arrivals.appendleft((data, since))
        peer.held = True

    def resume(self, peer: Peer) -> None:
        peer.held = False
        if peer.arrivals:
            self._turns.appendleft(peer)

    def forget(self, peer: Peer) -> None:
        """A client has gone: what waits of it is dropped."""
        if peer.arrivals and not peer.held:
            self._turns.remove(peer)
        self._count(peer, -peer.unprocessed)
        peer.arrivals.clear()

    def _count(self, peer: Peer, nbytes: int) -> None:
        peer.unprocessed += nbytes
        self._nbytes += nbytes
