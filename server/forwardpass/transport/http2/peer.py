"""One client's socket on the direct transport: what is unsent, and how it leaves over plain TCP and over TLS.

OpenSSL's rules, which `Client` keeps:

- It reads and writes by one state, so both are done with the lock of `connection.out` held.
- A write that it has begun and could not finish must be repeated with the same bytes and the same length. What is
  unsent leaves in pieces of one TLS record at most, and a piece that was begun is repeated as it was.
- A write may wait until there is something to read, and a read until the socket can be written (key updates): waiting
  for the other, the socket would be ready for ever.

Nothing here raises for what a client or its network does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import sys
from typing import Final

from forwardpass.transport.http2.connection import Connection

READ: Final = 1 << 16  # bytes taken from a socket at once
BACKLOG: Final = 1 << 20  # bytes that a client may leave unread; beyond that nothing is read from it
RECORD: Final = 1 << 14  # bytes of one TLS record, at most


class Peer:
    """One socket. What is unsent, and whether it is read, changes with the lock of `connection.out` held."""

    connection: Connection

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent = bytearray()
        self.watched = select.EPOLLIN
        self.secure = isinstance(sock, ssl.SSLSocket)
        self.handshaking = self.secure  # hands, as TLS has it: nothing can be sent or received yet
        self.piece = RECORD if self.secure else sys.maxsize  # bytes that are handed to the socket at once
        self.begun = 0  # bytes of `unsent` that OpenSSL has begun to write
        self.crossed = 0  # EPOLLIN: writing waits for something to read; EPOLLOUT: reading waits to write
        self.closed = False  # nothing is sent any more; it is to be lost, if it is not yet
        self.age = 0  # sweeps since it came, or since it took something of what is unsent
        self.deadline = deadline  # when it is asked to connect anew, on the monotonic clock

    @property
    def wanted(self) -> int:
        """The events to ask epoll for."""
        if self.crossed:
            return self.crossed
        if not self.unsent:
            return select.EPOLLIN
        # What waits for the client's windows must not keep this from reading, for it is reading that opens them; but
        # what waits behind a socket that is full was read from the same client.
        unread = len(self.unsent) + self.connection.out.queued
        return select.EPOLLOUT | select.EPOLLIN if unread < BACKLOG else select.EPOLLOUT

    def push(self) -> None:
        """Send what the socket takes of what is unsent; no more than BACKLOG, for others wait. With the lock held."""
        unsent, left = self.unsent, BACKLOG
        while unsent and left > 0:
            size = self.begun or min(len(unsent), self.piece, BACKLOG)
            try:
                # Released whatever happens: an error's traceback would keep `unsent` from being changed.
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
        with contextlib.suppress(OSError):  # so that epoll tells the thread that reads; SSLSocket's own does more
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        return False

    def decrypt(self) -> bytes | None:
        """What has come over TLS; b"" if nothing more will, None if nothing has. With the lock held."""
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
        """Whether TLS holds something that was read off the socket already, so that no poll tells of it."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0
