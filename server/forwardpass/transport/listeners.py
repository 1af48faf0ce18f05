"""The direct transport's listening sockets: accepting connections, and checking that they still listen."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
from collections.abc import Iterator

from forwardpass.observability.log_limit import LogLimit
from forwardpass.transport import addresses
from forwardpass.transport.handed_listener import HandedListener, Listener

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

ACCEPTS = 64  # connections accepted in one go, at most

# Errors of accept(2) that concern one connection, which is gone: Linux passes its pending network errors on. Any other
# error is the listener's or the machine's, and would recur at once.
ONE_CONNECTION = {
    errno.ECONNABORTED, errno.ECONNRESET, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENONET, errno.ETIMEDOUT,
}  # fmt: skip


class ListenerGone(Exception):
    """The port no longer accepts connections, and never will again."""


class Listeners:
    """Listeners on every address of a host, on one port. For the one thread that waits on `epoll`."""

    def __init__(self, host: str, port: int, epoll: select.epoll, handed: HandedListener | None = None) -> None:
        """Bind. Raises OSError if that fails. `handed`: listen there, in place of host and port."""
        listeners: list[Listener] = [handed] if handed is not None else [*addresses.listen(host, port)]
        self._sockets = {listener.fileno(): listener for listener in listeners}
        self._counts = None if handed is None else handed.counts
        first = listeners[0]
        self.port = 0 if first.family == socket.AF_UNIX else int(first.getsockname()[1])
        self.accept_paused = False  # nothing is accepted for now, as when no descriptors are left
        self._epoll = epoll
        for fd in self._sockets:
            epoll.register(fd, select.EPOLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._sockets

    def __iter__(self) -> Iterator[int]:
        return iter(self._sockets)

    def accept(self, fd: int) -> Iterator[socket.socket]:
        """Yield new connections, at most ACCEPTS of them."""
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._sockets[fd].accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in ONE_CONNECTION:
                    continue
                # Else epoll would report it for ever. The next `look` checks that it still listens, and accepts again.
                logger.warning("no connection can be accepted: %s", error.strerror)
                self._deafen()
                return
            yield sock

    def note_open(self, count: int) -> None:
        """Note how many connections are open, for the process that accepts them if that is another one."""
        if self._counts is not None:
            self._counts.open = count

    @property
    def must_look(self) -> bool:
        """Whether `look` must be called now and then, even while there is no connection."""
        return self.accept_paused or self._counts is not None

    def look(self) -> None:
        """Accept again after a failure. Raises ListenerGone if a socket no longer listens."""
        if self._counts is not None:
            self._counts.turns += 1
        if not all(map(accepts, self._sockets.values())):
            raise ListenerGone(f"port {self.port} accepts no connection any more")
        if self.accept_paused:
            self.accept_paused = False
            for fd in self._sockets:
                self._epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        self._deafen()
        self.accept_paused = False
        for listener in self._sockets.values():
            addresses.close(listener)
        self._sockets.clear()

    def _deafen(self) -> None:
        if not self.accept_paused:
            self.accept_paused = True
            for fd in self._sockets:
                with contextlib.suppress(OSError, ValueError):  # if the listener is gone
                    self._epoll.unregister(fd)


def accepts(listener: Listener) -> bool:
    """Whether the socket still listens, according to the kernel."""
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
