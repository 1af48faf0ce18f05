"""The direct transport's sockets: accepting, reading, writing and closing connections. Needs Linux (epoll).

One thread polls and reads. `transmit` is for any thread: bytes that a socket does not take at once are kept and sent
when it does, and meanwhile nothing is read from a client that leaves too much unread.

- A socket's failure ends that socket at most: `transmit`, `read` and `sweep` do not raise it, no other socket's events
  are lost, and no other's turn is delayed.
- A socket that can do nothing is not ready: each is watched only for the events it waits for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic

from forwardpass.observability.log_limit import LogLimit
from forwardpass.transport.handed_listener import HandedListener
from forwardpass.transport.http2.arrivals import Arrivals
from forwardpass.transport.http2.connection import Connection, ConnectionFailed
from forwardpass.transport.http2.peer import READ, Peer, Tls, prepared
from forwardpass.transport.http2.send_side import SendSide
from forwardpass.transport.listeners import ListenerGone, Listeners

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

AVAILABLE = hasattr(select, "epoll")

PULL = 1 << 18  # bytes taken from the protocol at once, to be sent
READS = 4  # of one socket in a row, before others get their turn
READ_SECONDS = 5e-3  # after which a turn ends: many small frames take long to process
SWEEP_SECONDS = 1.0  # between two checks for overdue calls and connections
MESSAGE_AGES = 30  # sweeps during which a call's message may make no progress
ANSWER_AGES = 60  # sweeps during which a client may take nothing of what it is sent
GREETING_AGES = 10  # sweeps until a client must have sent its HTTP/2 settings, the TLS handshake included
CLOSE_SECONDS = 1.0  # to send what is unsent when the transport closes


class Sockets:
    """Owns the listening port and every connection's socket. All except `transmit` and `wake` is for one thread."""

    def __init__(
        self,
        host: str,
        port: int,
        connect: Callable[[Peer], Connection],
        max_age: float,
        tls: Tls | None = None,
        handed: HandedListener | None = None,
    ) -> None:
        """Bind, or take connections from `handed`. Raises OSError if that fails. `connect` makes a client's protocol.

        `max_age`: seconds after which clients are asked to reconnect; 0: never. `tls` None: plaintext.
        """
        self._connect = connect
        self._max_age = max_age
        self._tls = tls
        self._peers: dict[int, Peer] = {}
        self._here = 0  # clients that were not asked to go
        self._epoll = select.epoll()
        self._listeners = Listeners(host, port, self._epoll, handed)
        self.port = self._listeners.port
        self._bell, self._ring = os.pipe()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._ready: deque[tuple[int, int]] = deque()  # events not yet handled
        self._again: list[int] = []  # descriptors to handle in the next turn, whatever epoll reports
        self._arrivals = Arrivals(monotonic())
        self._sweep_at = monotonic() + SWEEP_SECONDS

    # -- any thread ---------------------------------------------------------------------------------------------------

    def transmit(self, out: SendSide) -> None:
        """Send the protocol's pending bytes, as far as the socket takes them. With `out.lock` held."""
        peer: Peer = out.owner  # type: ignore[assignment]  # set by `_begin`
        if peer.closed or peer.handshaking:
            return
        while not peer.unsent:
            data = out.data_to_send(PULL)
            if not data:
                break
            if len(data) > peer.piece:
                peer.unsent += data
                peer.age = 0
                peer.push()
                continue
            try:
                sent = peer.sock.send(data)
            except Exception as error:
                if not peer.waits(error, len(data)):
                    return
                sent = 0
            if sent < len(data):
                peer.unsent += memoryview(data)[sent:]
                peer.age = 0
            elif len(data) < PULL:
                break
        out.unsent = len(peer.unsent)
        if peer.unsent or peer.watched != select.EPOLLIN:
            self._watch(peer)

    def wake(self) -> None:
        """Wake a waiting `poll`."""
        os.write(self._ring, b"\0")

    def _watch(self, peer: Peer) -> None:
        """Update the connection's epoll interest set. With the lock held."""
        if peer.handshaking or peer.closed:
            return
        wanted = peer.wanted
        if wanted != peer.watched:
            peer.watched = wanted
            self._epoll.modify(peer.fd, wanted)

    # -- one thread ---------------------------------------------------------------------------------------------------

    def poll(self, wait: bool) -> int:
        """Poll for events, or wait for one, at most until the next sweep. Returns how much there is to `read`.

        Raises ListenerGone.
        """
        if not self._ready:
            seconds, began = 0.0, monotonic()
            if wait and not self._again and not self._arrivals:
                seconds = max(1e-3, self._sweep_at - began) if self._peers or self._listeners.must_look else -1
            try:
                self._ready.extend(self._epoll.poll(seconds))
            except (OSError, ValueError) as error:
                raise ListenerGone(f"port {self.port} cannot be waited for: {error}") from None
            self._arrivals.polled(began, monotonic())
            if self._again:
                self._ready.extend((fd, select.EPOLLIN) for fd in self._again)
                self._again.clear()
        return len(self._ready) + bool(self._arrivals)

    def read(self, most: int) -> list[Connection]:
        """Read what the sockets have; process it until `most` calls have arrived, or for READ_SECONDS. Returns the
        connections that may have new or cancelled calls."""
        ready, peers, arrivals = self._ready, self._peers, self._arrivals
        news: dict[Connection, None] = {}
        while ready:
            fd, event = ready.popleft()
            peer = peers.get(fd)
            if peer is None:
                if fd in self._listeners:
                    self._accept(fd)
                elif fd == self._bell:
                    os.read(self._bell, 64)
                continue
            try:
                if peer.handshaking:
                    self._continue_handshake(peer)
                    continue
                if peer.crossed:
                    event |= select.EPOLLIN | select.EPOLLOUT
                if event & select.EPOLLOUT:
                    self._flush(peer)
                if event & ~select.EPOLLOUT:
                    news[peer.connection] = None
                    self._receive(peer)
            except Exception:
                news[self._failed(peer)] = None
        count, until = 0, monotonic() + READ_SECONDS
        while arrivals and count < most:
            peer, data, since = arrivals.take()
            if not (peer.crossed or peer.wanted & select.EPOLLIN):
                arrivals.hold(peer, data, since)
                continue
            connection = peer.connection
            news[connection] = None
            before = len(connection.arrived)
            try:
                self._process(peer, data, since)
            except Exception:
                self._failed(peer)
            count += len(connection.arrived) - before
            if arrivals and monotonic() > until:
                break
        return list(news)

    def _failed(self, peer: Peer) -> Connection:
        """Close a connection because of the exception being handled; return its protocol."""
        logger.exception("a connection is closed: reading or writing it failed")
        self.close_peer(peer)
        return peer.connection

    def sweep(self) -> list[Connection]:
        """Every SWEEP_SECONDS, end what is overdue. Returns the connections with rejected or cancelled calls.

        Raises ListenerGone.
        """
        now = monotonic()
        if now < self._sweep_at:
            return []
        self._sweep_at = now + SWEEP_SECONDS
        self._listeners.look()
        connections = [peer.connection for peer in self._peers.values()]
        for peer in list(self._peers.values()):
            try:
                self._age(peer, now)
            except Exception:
                logger.exception("a connection is closed: its stalled calls could not be expired")
                self.close_peer(peer)
        return [c for c in connections if c.refused or c.cancelled]

    def _age(self, peer: Peer, now: float) -> None:
        connection = peer.connection
        peer.age += 1
        connection.patience.roll()
        connection.expire_stalled(MESSAGE_AGES, ANSWER_AGES)
        silent = not connection.greeted and peer.age > GREETING_AGES
        with connection.out.lock:  # else another thread's response may be moving from one to the other
            stuck = bool(peer.unsent) and peer.age > ANSWER_AGES
            idle = not (connection.streams or connection.out.queued or peer.unsent or peer.unprocessed)
        if silent or stuck or ((connection.draining or connection.closed) and idle):
            self.close_peer(peer)
        elif now > peer.deadline or (not connection.departing and connection.narrow):
            # The next sweep sends the second GOAWAY, whether or not the client acknowledges the PING.
            why = "max_connection_age" if now > peer.deadline else "the connection's receive window is used up"
            peer.deadline = float("inf") if connection.departing else 0.0
            self._leaves(peer)
            connection.depart(why)

    def drain(self) -> None:
        """Accept no more connections, and ask current clients to go elsewhere. Calls on their way are served."""
        self._close_listeners()
        self._sweep_at = monotonic() + SWEEP_SECONDS  # clients have that long to answer
        self.part_with(len(self._peers), "the server is stopping")

    def part_with(self, count: int, why: str) -> None:
        """Ask `count` clients to go elsewhere, those that have been here for the longest."""
        staying = [peer for peer in self._peers.values() if not peer.connection.departing]
        for peer in staying[:count]:
            peer.deadline = 0.0
            self._leaves(peer)
            peer.connection.depart(why)

    def _leaves(self, peer: Peer) -> None:
        """A client is gone, or was asked to go."""
        if not peer.leaving:
            peer.leaving = True
            self._here -= 1
            self._listeners.note_open(self._here)

    @property
    def settled(self) -> bool:
        """Whether all calls on their way have arrived. A client that never spoke HTTP/2 has none."""
        return all(c.connection.draining or (c.age and not c.connection.greeted) for c in self._peers.values())

    def close(self) -> list[Connection]:
        """Send the last GOAWAY and what is left, then close everything. Returns the connections there were."""
        until = monotonic() + CLOSE_SECONDS
        self._close_listeners()
        connections = [peer.connection for peer in self._peers.values()]
        for peer in self._peers.values():
            peer.connection.departing = True
            peer.connection.depart()  # rejects calls that arrive from now on
        while monotonic() < until and any(c.unsent or c.connection.out.queued for c in self._peers.values()):
            if not self.poll(wait=False):
                self._ready.extend(self._epoll.poll(0.05))
            self.read(1 << 30)
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_WR)  # else data unread here would discard data unread by the client
            self.close_peer(peer)
        self._epoll.close()
        os.close(self._bell)
        os.close(self._ring)
        return connections

    def _receive(self, peer: Peer) -> None:
        """Read what a socket has, up to the bounds of one turn and of one client."""
        if peer.closed:
            self.close_peer(peer)
            return
        for _ in range(READS):
            if peer.ended or not self._arrivals.has_room(peer):
                break
            data: bytes | None
            try:
                data = self._decrypt(peer) if peer.secure else peer.sock.recv(READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data is None:
                return
            self._arrivals.add(peer, data)
            if not data:
                peer.ended = True
                return
            if len(data) < READ and not peer.secure:
                return
        if peer.undelivered and not peer.held:
            self._again.append(peer.fd)

    def _resume(self, peer: Peer) -> None:
        self._arrivals.resume(peer)
        if peer.undelivered:
            self._again.append(peer.fd)

    def _process(self, peer: Peer, data: bytes, since: float) -> None:
        connection = peer.connection
        if not data:
            self.close_peer(peer)
            return
        connection.received = since
        try:
            connection.receive(data, self._arrivals.now - since)
        except ConnectionFailed as failure:
            logger.debug("a connection is closed: %s", failure)
            self.close_peer(peer)
            return
        if connection.closed and not peer.unsent:
            self.close_peer(peer)

    def _decrypt(self, peer: Peer) -> bytes | None:
        with peer.connection.out.lock:  # other threads write
            data = peer.decrypt()
            self._watch(peer)
        return data

    def _continue_handshake(self, peer: Peer) -> None:
        """Continue the TLS handshake; once it is done, send what was queued."""
        wanted = peer.handshake()
        if wanted is None:
            self.close_peer(peer)
        elif not wanted:
            self._flush(peer)
            self._again.append(peer.fd)
        elif wanted != peer.watched:
            peer.watched = wanted
            self._epoll.modify(peer.fd, wanted)

    def _close_listeners(self) -> None:
        for fd in list(self._listeners):
            self._accept(fd)  # else those that the kernel has already accepted would be reset
        self._listeners.close()

    def _accept(self, fd: int) -> None:
        for sock in self._listeners.accept(fd):
            try:
                self._begin(sock)
            except OSError as error:
                logger.warning("a connection failed as it began: %s", error)
                sock.close()
            except Exception:
                logger.exception("a connection is closed: it could not be begun")
                sock.close()

    def _begin(self, sock: socket.socket) -> None:
        """Set up a new connection. Raises OSError if it is gone already."""
        sock = prepared(sock, self._tls)
        age = self._max_age * random.uniform(0.9, 1.1)  # so that clients that came together leave apart
        peer = Peer(sock, monotonic() + age if age else float("inf"))
        connection = peer.connection = self._connect(peer)
        try:
            self._epoll.register(peer.fd, peer.watched)
        except OSError:
            sock.close()  # by now the TLS socket, if there is TLS
            raise
        self._peers[peer.fd] = peer
        self._here += 1
        self._listeners.note_open(self._here)
        with connection.out.lock:
            self.transmit(connection.out)

    def _flush(self, peer: Peer) -> None:
        out = peer.connection.out
        with out.lock:
            peer.push()
            out.flush()
        if peer.held and peer.wanted & select.EPOLLIN:
            self._resume(peer)

    def close_connection(self, connection: Connection) -> None:
        """As `close_peer`, for a connection."""
        self.close_peer(connection.out.owner)  # type: ignore[arg-type]  # set by `_begin`

    def close_peer(self, peer: Peer) -> None:
        """Close a connection; its calls are cancelled."""
        if self._peers.get(peer.fd) is not peer:
            return
        del self._peers[peer.fd]
        self._leaves(peer)
        self._arrivals.forget(peer)
        with peer.connection.out.lock:
            peer.closed = True
            peer.unsent.clear()
        with contextlib.suppress(OSError):
            self._epoll.unregister(peer.fd)
        with contextlib.suppress(OSError):
            peer.sock.close()
        peer.connection.lose()
