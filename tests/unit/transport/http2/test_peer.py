"""How what is unsent leaves a socket, with a script in the socket's place, where OpenSSL asks for what a test likes."""

from __future__ import annotations

import select
import socket
import ssl
from typing import Any

import pytest

from forwardpass.transport.http2.connection import Connection
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.peer import BACKLOG, RECORD, Peer
from forwardpass.transport.memory_budget import MemoryBudget

READ, WRITE = ssl.SSLWantReadError, ssl.SSLWantWriteError


class Scripted(ssl.SSLSocket):
    """A TLS socket that does, in turn, what `script` has: an error to raise, or all of it; then all of everything."""

    def __new__(cls, *_: Any) -> Any:
        return socket.socket.__new__(cls)

    def __init__(self, *script: type[BaseException] | bytes | None) -> None:
        socket.socket.__init__(self)
        self.script = list(script)
        self.tried: list[bytes] = []

    def _next(self) -> bytes | None:
        step = self.script.pop(0) if self.script else None
        if isinstance(step, type):
            raise step
        return step

    def send(self, data: Any, flags: int = 0) -> int:
        self.tried.append(bytes(data))
        self._next()
        return len(data)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        return self._next() or b""


def made(*script: type[BaseException] | bytes | None) -> tuple[Peer, Scripted]:
    sock = Scripted(*script)
    client = Peer(sock, 0.0)
    client.connection = Connection(
        ConnectionLimits(1, 1 << 14, 1), MemoryBudget(1), b"", lambda _: None, lambda _: None, client
    )
    client.handshaking = False
    return client, sock


def test_a_write_that_was_begun_is_repeated_with_the_same_bytes() -> None:
    """Whatever was added meanwhile, and however short it was."""
    client, sock = made(WRITE, WRITE)
    client.unsent += b"a" * 100
    client.push()
    client.unsent += b"b" * 50_000
    client.push()
    client.push()
    assert sock.tried[:3] == [b"a" * 100] * 3
    assert b"".join(sock.tried[2:]) == b"a" * 100 + b"b" * 50_000 and not client.unsent
    assert max(map(len, sock.tried)) == RECORD
    sock.close()


def test_one_push_leaves_room_for_others() -> None:
    client, sock = made()
    client.unsent += bytes(5 * BACKLOG)
    client.push()
    assert len(client.unsent) == 4 * BACKLOG and client.wanted == select.EPOLLOUT
    sock.close()


def test_what_a_write_waits_for_is_what_is_watched() -> None:
    """A socket that could be written, and yet waits to read, would be ready for ever."""
    client, sock = made(READ, WRITE, None)
    client.unsent += b"x"
    client.push()
    assert client.wanted == select.EPOLLIN
    client.push()
    assert client.wanted == select.EPOLLOUT | select.EPOLLIN
    client.push()
    assert client.wanted == select.EPOLLIN
    sock.close()


def test_what_a_read_waits_for_is_what_is_watched() -> None:
    client, sock = made(WRITE, READ, b"data", OSError)
    assert client.decrypt() is None and client.wanted == select.EPOLLOUT
    assert client.decrypt() is None and client.wanted == select.EPOLLIN
    assert client.decrypt() == b"data" and client.wanted == select.EPOLLIN
    assert client.decrypt() == b""
    sock.close()


@pytest.mark.parametrize("error", [ConnectionResetError, ssl.SSLError, ssl.SSLEOFError, ValueError])
def test_whatever_goes_wrong_ends_this_socket_alone(error: type[Exception]) -> None:
    client, sock = made(error)
    client.unsent += bytes(100_000)
    client.push()
    assert client.closed and not client.unsent
    sock.close()
