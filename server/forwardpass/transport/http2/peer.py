"""One client's socket on the direct transport: its unsent bytes, and how they leave over plain TCP and over TLS.

OpenSSL's rules, which `Peer` follows:

- Reads and writes share one state, so both happen with the lock of `connection.out` held.
- A write that was begun and not finished must be repeated with the same bytes and the same length. Unsent bytes leave
  in pieces of one TLS record at most, and a piece that was begun is repeated unchanged.
- A write may have to wait until the socket is readable, and a read until it is writable (key updates): watched for the
  other event, the socket would be ready for ever.

Nothing here raises because of what a client or its network does.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

from forwardpass.observability.log_limit import LogLimit
from forwardpass.transport.http2.connection import Connection

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

READ: Final = 1 << 16  # bytes taken from a socket at once
BACKLOG: Final = 1 << 20  # bytes that a client may leave unread; beyond that nothing is read from it
RECORD: Final = 1 << 14  # bytes of one TLS record, at most

Tls = Callable[[], ssl.SSLContext]  # returns the TLS context for a new connection


class Peer:
    """One socket. Its unsent bytes, and whether it is read, change with the lock of `connection.out` held."""

    connection: Connection

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent = bytearray()
        self.watched = select.EPOLLIN
        self.secure = isinstance(sock, ssl.SSLSocket)
        self.handshaking = self.secure  # the TLS handshake is under way: nothing can be sent or received yet
        self.piece = RECORD if self.secure else sys.maxsize  # bytes passed to the socket at once, at most
        self.begun = 0  # bytes of `unsent` that OpenSSL has begun to write
        self.crossed = 0  # EPOLLIN: a write waits for input; EPOLLOUT: a read waits to write
        self.closed = False  # nothing is sent any more; it must be closed if it is not yet
        self.age = 0  # sweeps since it connected, or since it took unsent bytes
        self.unprocessed = 0  # bytes read from it and not yet processed
        self.arrivals: deque[tuple[bytes, float]] = deque()  # these bytes, and since when they may have waited
        self.held = False  # they wait until it takes what it is owed
        self.leaving = False  # it was asked to go elsewhere, or is gone
        self.ended = False  # nothing more can be read from it
        self.deadline = deadline  # when it is asked to reconnect, on the monotonic clock

    def name(self) -> str:
        """The client's address; empty if it is gone, or came through a Unix socket."""
        try:
            found = self.sock.getpeername()
        except OSError:
            return ""
        return f"{found[0]}:{found[1]}" if isinstance(found, tuple) else ""

    @property
    def wanted(self) -> int:
        """The events to watch with epoll."""
        if self.crossed:
            return self.crossed
        if not self.unsent:
            return select.EPOLLIN
        # Data that waits for the client's windows must not stop reading, since reading is what opens them; but data
        # that waits behind a full socket results from what was read from the same client.
        unread = len(self.unsent) + self.connection.out.queued
        return select.EPOLLOUT | select.EPOLLIN if unread < BACKLOG else select.EPOLLOUT

    def handshake(self) -> int | None:
        """Continue the TLS handshake. Returns the events that it waits for, 0 once it is done; None: it failed."""
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            return select.EPOLLIN
        except ssl.SSLWantWriteError:
            return select.EPOLLOUT
        except OSError as error:  # every SSLError is one
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            logger.warning("a TLS handshake failed: %s", reason.lower().replace("_", " "))
            return None
        self.handshaking = False
        return 0

    def push(self) -> None:
        """Send unsent bytes as far as the socket takes them; at most BACKLOG, since others wait. With the lock held."""
        unsent, left = self.unsent, BACKLOG
        while unsent and left > 0:
            size = self.begun or min(len(unsent), self.piece, BACKLOG)
            try:
                # Released whatever happens: a view kept by an error's traceback would stop `unsent` from being resized.
                with memoryview(unsent) as whole, whole[:size] as piece:
                    sent = self.sock.send(piece)
            except Exception as error:
                self.waits(error, size)
                return
            self.begun = self.crossed = self.age = 0
            del unsent[:sent]
            left -= sent
            if sent < size:
                return

    def waits(self, error: Exception, size: int) -> bool:
        """Whether a socket that did not take `size` bytes may do so later; otherwise nothing more is sent to it.

        With the lock held.
        """
        if isinstance(error, BlockingIOError):
            return True
        if isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):
            self.begun = size
            self.crossed = select.EPOLLIN if isinstance(error, ssl.SSLWantReadError) else 0
            return True
        self.closed = True
        self.unsent.clear()
        with contextlib.suppress(OSError):  # so that epoll wakes the receiving thread; SSLSocket's own does more
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        return False

    def decrypt(self) -> bytes | None:
        """Return bytes received over TLS; b"" at the end, None if there are none yet. With the lock held."""
        try:
            data = self.sock.recv(READ)
        except ssl.SSLWantWriteError:
            self.crossed = select.EPOLLOUT
            return None
        except ssl.SSLWantReadError:
            if self.crossed == select.EPOLLOUT:
                self.crossed = 0
            return None
        except OSError:
            return b""
        self.crossed = 0
        return data

    @property
    def undelivered(self) -> bool:
        """Whether TLS holds bytes already read off the socket, which no poll reports."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0


def prepared(sock: socket.socket, tls: Tls | None) -> socket.socket:
    """A connection that was accepted, ready to be a peer's. `tls` None: plaintext."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock if tls is None else tls().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
