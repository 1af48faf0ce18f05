"""The direct transport's sockets, driven by hand: who is let go when, and that what was answered still leaves."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.service import http2_frames as http2

from forwardpass.transport.http2 import connection, engine, sockets
from forwardpass.transport.http2.connection import HEARD, Connection
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.peer import Peer
from forwardpass.transport.http2.sockets import Sockets
from forwardpass.transport.memory_budget import MemoryBudget

pytestmark = pytest.mark.skipif(not sockets.AVAILABLE, reason="needs Linux (epoll)")

PATH = b"/p"
# POST, http, an authority, the path and the content type, as literals.
HEADERS = b"\x83\x86\x01\x01t\x04\x02/p\x0f\x10\x10application/grpc"


class Server:
    """Sockets with an echo behind them, run turn by turn."""

    def __init__(self, max_age: float = 0.0) -> None:
        self.sockets = Sockets("127.0.0.1", 0, self._connect, max_age)
        self.answer = b""  # in place of what was asked

    def _connect(self, peer: Peer) -> Connection:
        limits = ConnectionLimits(100, 16384, 1 << 24)
        return Connection(limits, MemoryBudget(1 << 30), PATH, lambda _: None, self.sockets.transmit, peer)

    def turn(self, wait: bool = False) -> None:
        if self.sockets.poll(wait):
            for connection in self.sockets.read(100):
                arrived, connection.arrived[:] = connection.arrived[:], ()
                with connection.out.lock:
                    connection.out.respond([(call, self.answer or message, ()) for call, message in arrived])

    def until(self, there: Callable[[], Any], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end
            self.turn()
            time.sleep(0.001)

    def sweep(self) -> None:
        self.sockets._sweep_at = 0.0
        self.sockets.sweep()

    @property
    def clients(self) -> list[Peer]:
        return list(self.sockets._peers.values())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    if not made.sockets._epoll.closed:
        made.sockets.close()


def connected(server: Server, *data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.sockets.port), 20)
    client.sendall(b"".join(data))
    before = len(server.clients)
    server.until(lambda: len(server.clients) > before)
    return client


def hello(**settings: int) -> bytes:
    return http2.PREFACE + http2.settings(**settings)


def call(stream: int, message: bytes = b"m") -> bytes:
    body = http2.MESSAGE_STRUCT.pack(0, len(message)) + message
    return http2.frame(http2.HEADERS, 4, stream, HEADERS) + http2.frame(http2.DATA, 1, stream, body)


def frames(client: socket.socket) -> list[tuple[int, int, bytes]]:
    """(kind, stream, payload) of all that comes until the server closes."""
    data = b""
    while more := client.recv(1 << 16):
        data += more
    found = []
    while data:
        word, _, stream = http2.HEAD_STRUCT.unpack_from(data)
        found.append((word & 0xFF, stream, data[9 : 9 + (word >> 8)]))
        data = data[9 + (word >> 8) :]
    return found


def test_who_says_nothing_is_let_go_and_who_speaks_is_not(server: Server) -> None:
    silent, halting, speaking = connected(server), connected(server, b"PRI"), connected(server, hello())
    server.until(lambda: any(c.connection.greeted for c in server.clients))
    for _ in range(sockets.GREETING_AGES):
        server.sweep()
    assert len(server.clients) == 3
    server.sweep()
    assert [c.connection.greeted for c in server.clients] == [True]
    for client in (silent, halting):
        while client.recv(65536):  # the greeting, then the end
            pass
    for client in (silent, halting, speaking):
        client.close()


def goaways(told: list[tuple[int, int, bytes]]) -> list[int]:
    """The last call that each GOAWAY says is served."""
    return [int.from_bytes(payload[:4], "big") for kind, _, payload in told if kind == http2.GOAWAY]


def test_a_drain_serves_what_was_on_its_way_and_refuses_what_comes_after(server: Server) -> None:
    client = connected(server, hello(), call(1))
    server.until(lambda: any(c.connection.last_stream == 1 for c in server.clients))
    with socket.create_connection(("127.0.0.1", server.sockets.port), 20) as waiting:  # not accepted yet
        waiting.sendall(hello())
        server.sockets.drain()
        assert len(server.clients) == 2, "whom the kernel has accepted is not reset"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.sockets.port), 20)
    own = server.clients[0]
    client.sendall(call(3))  # sent before the news was read
    server.until(lambda: own.connection.last_stream == 3)
    assert not own.connection.draining and not server.sockets.settled
    client.sendall(http2.frame(http2.PING, http2.ACK, 0, HEARD))
    server.until(lambda: own not in server.clients)  # all that it asked was answered
    server.until(lambda: not server.clients)  # the other has gone by itself
    assert server.sockets.settled
    told = frames(client)
    assert [stream for kind, stream, _ in told if kind == http2.DATA] == [1, 3]
    assert goaways(told) == [http2.LAST_STREAM, 3]
    client.close()


def test_a_drain_waits_a_sweep_for_who_leaves_the_ping_unanswered(server: Server) -> None:
    client = connected(server, hello(), call(1))
    probe = connected(server)
    server.until(lambda: any(c.connection.last_stream == 1 for c in server.clients))
    server.sockets.drain()
    assert not server.sockets.settled
    server.sweep()
    assert server.sockets.settled
    server.sockets.close()
    assert goaways(frames(client)) == [http2.LAST_STREAM, 1], "closing says nothing new"
    for sock in (client, probe):
        sock.close()


def test_an_aged_connection_is_told_twice_and_goes_when_its_last_call_has(server: Server) -> None:
    server.sockets._max_age = 1000.0
    client = connected(server, hello(initial_window_size=0), call(1, b"x" * 50))
    server.until(lambda: any(c.connection.out.queued for c in server.clients))
    (own,) = server.clients
    own.deadline = 1.0  # long past
    server.sweep()
    assert not own.connection.draining
    server.sweep()
    assert own.connection.draining and server.clients == [own]
    client.sendall(call(3))  # it did not know yet
    server.sweep()
    assert server.clients == [own], "a call is still to be answered"
    client.sendall(http2.window_update(1, 1000))
    server.until(lambda: not own.connection.out.queued)
    server.sweep()
    assert not server.clients
    told = frames(client)
    assert goaways(told) == [http2.LAST_STREAM, 1]
    assert b"".join(p for k, s, p in told if k == http2.DATA and s == 1)[5:] == b"x" * 50
    assert not [stream for _, stream, _ in told if stream == 3], "the last GOAWAY says that it was not served"
    client.close()


def test_a_window_that_was_not_given_back_is_replaced_with_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of calls that contradict their content-length are lost to it; before it is closed, the client goes."""
    window, size = 1 << 20, 16_000
    for module in connection, engine:
        monkeypatch.setattr(module, "WINDOW", window)
    client = connected(server, hello())
    (own,) = server.clients
    length = b"\x0f\x0d\x0599999"  # content-length
    for stream in range(1, 2 * (window // size), 2):
        server.sweep()
        if own.connection.departing:
            break
        client.sendall(http2.frame(http2.HEADERS, 4, stream, HEADERS + length))
        client.sendall(http2.frame(http2.DATA, 1, stream, bytes(size)))
        server.until(lambda stream=stream: own.connection.last_stream == stream and not own.connection.streams)
    client.sendall(call(stream))  # sent before the news was read
    server.until(lambda: own.connection.last_stream == stream)
    server.sweep()
    server.sweep()
    assert not server.clients
    told = frames(client)
    assert goaways(told) == [http2.LAST_STREAM, stream]
    assert [number for kind, number, _ in told if kind == http2.DATA] == [stream]
    client.close()


def test_a_connection_is_not_idle_while_its_last_answer_is_being_queued(server: Server) -> None:
    client = connected(server, hello(initial_window_size=http2.LARGEST_WINDOW), http2.window_update(0, 1 << 30))
    server.until(lambda: server.clients[0].connection.greeted)
    (own,) = server.clients
    client.sendall(call(1))
    server.until(lambda: server.sockets.poll(False))
    ((arrived,),) = [connection.arrived for connection in server.sockets.read(100)]
    connection, begun = own.connection, threading.Event()
    for _ in range(2):
        connection.depart()

    class Slow:
        """libnghttp2, with time to look at a call that is under way no more when nothing is queued yet."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def send_response(self, *arguments: Any) -> None:
            begun.set()
            end = time.monotonic() + 0.2
            while server.clients and time.monotonic() < end:
                time.sleep(0.001)
            self._engine.send_response(*arguments)

    connection.out._engine = Slow(connection.out._engine)  # type: ignore[assignment]

    def respond() -> None:
        with connection.out.lock:
            connection.out.respond([(arrived[0], bytes(16 << 20), ())])

    other = threading.Thread(target=respond)
    expire = connection.expire_stalled

    def and_then(*ages: int) -> None:
        expire(*ages)
        other.start()
        assert begun.wait(20)

    connection.expire_stalled = and_then  # type: ignore[method-assign]
    server.sweep()
    other.join()
    assert server.clients
    connection.expire_stalled = expire  # type: ignore[method-assign]
    told: list[tuple[int, int, bytes]] = []
    reader = threading.Thread(target=lambda: told.extend(frames(client)))
    reader.start()
    server.until(lambda: not own.unsent and not connection.out.queued)
    server.sweep()
    reader.join(20)
    assert sum(len(payload) for kind, _, payload in told if kind == http2.DATA) == (16 << 20) + 5
    client.close()


def test_closing_waits_for_what_a_client_is_still_taking(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer larger than the client's window, and larger than the sockets hold: all of it leaves."""
    monkeypatch.setattr(sockets, "CLOSE_SECONDS", 60.0)
    server.answer = bytes(range(256)) * 40_000
    client = connected(server, hello(), call(1))
    server.until(lambda: any(c.connection.out.queued for c in server.clients))
    got: list[tuple[int, int, bytes]] = []

    def take() -> None:
        client.sendall(http2.window_update(1, 1 << 24) + http2.window_update(0, 1 << 24))
        got.extend(frames(client))

    taking = threading.Thread(target=take)
    taking.start()
    server.sockets.close()
    taking.join(20)
    assert b"".join(p for k, s, p in got if k == http2.DATA and s == 1)[5:] == server.answer
    client.close()


def test_a_client_that_takes_nothing_is_let_go(server: Server) -> None:
    server.answer = bytes(1 << 24)
    client = connected(server, hello(initial_window_size=(1 << 31) - 1), http2.window_update(0, 1 << 30), call(1))
    server.until(lambda: any(c.unsent for c in server.clients))
    (own,) = server.clients
    assert not own.watched & select.EPOLLIN, "nothing is read from it meanwhile"
    for _ in range(sockets.ANSWER_AGES):
        server.sweep()
    assert server.clients == [own]
    server.sweep()
    assert not server.clients
    client.close()


# -- what one socket does is its own affair ---------------------------------------------------------------------------


def stuck(server: Server) -> socket.socket:
    """A client that takes nothing of its answer."""
    server.answer = bytes(1 << 24)
    wide = hello(initial_window_size=(1 << 31) - 1)
    client = connected(server, wide, http2.window_update(0, 1 << 30), call(1))
    server.until(lambda: any(c.unsent for c in server.clients))
    return client


def test_a_socket_that_can_do_nothing_is_not_ready(server: Server) -> None:
    client = stuck(server)
    while server.sockets.poll(wait=False):  # what is left of before
        server.turn()
    assert [server.sockets.poll(wait=False) for _ in range(100)] == [0] * 100
    client.close()


def broken(*_: object) -> None:
    raise ZeroDivisionError("this connection's")


@pytest.mark.parametrize("method", ["receive", "expire_stalled"])
def test_a_connection_that_breaks_takes_no_others_news_along(server: Server, method: str) -> None:
    clients = [connected(server, hello()) for _ in range(3)]
    server.until(lambda: all(c.connection.greeted for c in server.clients))
    second = server.clients[1]
    setattr(second.connection, method, broken)
    for client in clients:
        client.sendall(call(1))
    if method == "receive":
        server.until(lambda: second not in server.clients)
    else:
        server.sweep()
        assert second not in server.clients
    server.until(lambda: all(c.connection.last_stream for c in server.clients))
    assert len(server.clients) == 2 and not any(c.connection.streams for c in server.clients)
    assert all(c.age for c in server.clients) or method == "receive", "the sweep went on"
    for client in clients:
        client.close()


def test_a_write_that_fails_loses_its_connection_in_the_next_turn(server: Server) -> None:
    """By whichever thread it was made: what was under way is the news of the one that reads."""
    client, other = stuck(server), connected(server, hello())
    first = server.clients[0]
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()  # a reset
    connection = first.connection
    with connection.out.lock:
        first.push()
    assert first.closed and not first.unsent
    assert server.sockets.poll(wait=False)
    assert connection in server.sockets.read(100)
    assert first not in server.clients and [c.number for c in connection.cancelled] in ([], [1])
    server.answer = b""
    other.sendall(call(1))
    server.until(lambda: not server.clients[0].connection.streams and server.clients[0].connection.last_stream)
    other.close()


def test_a_client_that_never_stops_sending_keeps_nobody_waiting(server: Server) -> None:
    """One turn reads so much of it; the others are asked in the same turn."""
    flood, other = connected(server, hello()), connected(server, hello())
    over = threading.Event()

    def send() -> None:
        pings = http2.frame(http2.PING, http2.ACK, 0, bytes(8)) * 10_000
        while not over.is_set():
            flood.sendall(pings)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        for stream in range(1, 40, 2):
            other.sendall(call(stream))
            server.until(lambda s=stream: server.clients[1].connection.last_stream == s)
    finally:
        over.set()
        flood.shutdown(socket.SHUT_RD)
        server.until(lambda: not thread.is_alive())
    flood.close()
    other.close()


def test_a_client_whose_bytes_take_long_is_read_from_once_in_a_turn(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames may be as small as nine bytes: it is the time that they take which others wait for."""
    client = connected(server, hello())
    server.until(lambda: server.clients[0].connection.greeted)
    (own,) = server.clients
    monkeypatch.setattr(sockets, "READ", 1700)
    client.sendall(http2.frame(http2.PING, http2.ACK, 0, bytes(8)) * 300)  # three times as much
    while len(own.sock.recv(5100, socket.MSG_PEEK)) < 5100:
        time.sleep(0.001)
    receive, read = own.connection.receive, list[int]()

    def slowly(data: bytes, unread: float = 0.0) -> None:
        read.append(len(data))
        receive(data, unread)
        now[0] += sockets.READ_SECONDS * slow

    own.connection.receive = slowly  # type: ignore[method-assign]
    now, slow = [time.monotonic()], 1.5
    monkeypatch.setattr(sockets, "monotonic", lambda: now[0])
    server.turn()
    assert read == [1700]
    slow = 0.0
    server.turn()
    assert read == [1700] * 3
    client.close()


def test_a_listener_that_is_gone_is_noticed(server: Server) -> None:
    client = connected(server, hello())
    server.sweep()
    for listener in server.sockets._listeners._sockets.values():
        listener.shutdown(socket.SHUT_RDWR)
    server.turn(wait=True)  # epoll tells; it is not asked again and again
    while server.sockets.poll(wait=False):
        server.turn()
    with pytest.raises(sockets.ListenerGone, match=str(server.sockets.port)):
        server.sweep()
    client.close()
