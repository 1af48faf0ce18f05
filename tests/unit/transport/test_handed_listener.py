"""Connections that come from another process: to a transport they are like any other."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forwardpass.transport.handed_listener import HandedListener, PortCounts
from forwardpass.transport.listeners import Listeners, accepts


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, HandedListener]]:
    giver, taker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    counts, descriptor = PortCounts.made()
    os.close(descriptor)
    listener = HandedListener(taker, 4711, counts)
    with giver:
        yield giver, listener
    listener.close()


def hand(giver: socket.socket, connection: socket.socket) -> None:
    giver.sendmsg([b"c"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])


def test_a_connection_that_is_handed_over_works(pair: tuple[socket.socket, HandedListener]) -> None:
    giver, listener = pair
    with pytest.raises(BlockingIOError):
        listener.accept()
    client, served = socket.socketpair()
    with client:
        with served:
            hand(giver, served)
        connection, _ = listener.accept()
        with connection:
            assert not connection.get_inheritable()
            client.sendall(b"hello")
            assert connection.recv(5) == b"hello"
    assert listener.counts.taken == 1
    assert accepts(listener) and listener.getsockname() == ("", 4711)


def test_one_without_a_descriptor_is_that_connections_failure_alone(
    pair: tuple[socket.socket, HandedListener],
) -> None:
    giver, listener = pair
    giver.send(b"c")
    with pytest.raises(ConnectionAbortedError):
        listener.accept()
    assert listener.counts.taken == 1


def test_the_end_of_the_giver_is_an_error(pair: tuple[socket.socket, HandedListener]) -> None:
    giver, listener = pair
    giver.close()
    with pytest.raises(ConnectionResetError):
        listener.accept()


def test_listeners_take_them_and_note_what_the_giver_must_know(pair: tuple[socket.socket, HandedListener]) -> None:
    giver, listener = pair
    epoll = select.epoll()
    with contextlib.closing(epoll):
        listeners = Listeners("", 0, epoll, listener)
        assert listeners.port == 4711 and listeners.must_look
        client, served = socket.socketpair()
        with client, served:
            hand(giver, served)
            ((fd, _),) = epoll.poll(5)
            (connection,) = listeners.accept(fd)
            connection.close()
        listeners.note_open(3)
        listeners.look()
        assert (listener.counts.taken, listener.counts.open, listener.counts.turns) == (1, 3, 1)
        listeners.close()


def test_counts_are_seen_through_the_descriptor() -> None:
    counts, descriptor = PortCounts.made()
    other = PortCounts(descriptor)
    os.close(descriptor)
    counts.taken, counts.open, counts.turns = 1, 2, 3
    assert (other.taken, other.open, other.turns) == (1, 2, 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    other.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1
    counts.taken = 9
    assert (other.taken, other.open, other.turns) == (1, 2, 3)
