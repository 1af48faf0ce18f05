"""The load generator's connection against a server that does what each test wants, frame by frame."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import ngh2
import pytest
from ngh2.events import RequestReceived
from ngh2.exceptions import ConnectionStateError

from forwardpass.errors import Status
from forwardpass.transport.http2 import client_connection
from forwardpass.transport.http2.client_connection import (
    ClientConnection,
    Ended,
    framed,
    request_fields,
    timeout_field,
)

FIELDS = request_fields("/s/m", "h:1")
OPENING = [(b":status", b"200"), (b"content-type", b"application/grpc")]
MAX_CONCURRENT_STREAMS = 3


class Server:
    """One connection's other end, turn by turn."""

    def __init__(self, settings: dict[int, int], keep: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = ClientConnection("127.0.0.1", listener.getsockname()[1], keep_answers=keep)
            self.socket, _ = listener.accept()
        self.socket.setblocking(False)
        self.engine = ngh2.Connection(ngh2.Role.SERVER)
        self.engine.initiate_connection(settings)
        self.requests: list[RequestReceived] = []
        self.ended: list[Ended] = []

    def turn(self) -> None:
        """Let everything that is sent be received, both ways, until nothing is."""
        self.client.flush()
        while not self.client.lost and select.select([self.socket, self.client.socket], [], [], 0.05)[0]:
            with contextlib.suppress(BlockingIOError, ConnectionStateError):  # it may have said goodbye
                self.engine.receive_data(self.socket.recv(1 << 20))
            self.requests += [e for e in self.engine.events() if isinstance(e, RequestReceived)]
            if data := self.engine.data_to_send():
                self.socket.sendall(data)
            self.ended += self.client.receive()
            self.client.flush()

    def send(self) -> None:
        self.socket.sendall(self.engine.data_to_send())
        self.turn()

    def answer(self, stream: int, trailers: list[tuple[bytes, bytes]], message: bytes = b"answer") -> None:
        self.engine.send_response(stream, OPENING)
        self.engine.send_data(stream, framed(message))
        self.engine.send_trailers(stream, trailers)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(settings: dict[int, int] | None = None, keep: bool = False) -> Server:
        made.append(Server(settings or {}, keep))
        return made[-1]

    yield start
    for server in made:
        server.client.close()
        server.socket.close()


@pytest.mark.parametrize("keep", [False, True])
def test_a_call_is_sent_and_its_end_comes_with_its_token(serve: Callable[..., Server], keep: bool) -> None:
    server = serve(keep=keep)
    server.client.start("token", [*FIELDS, timeout_field(50_000)], framed(b"question"))
    assert server.client.in_flight == 1
    server.turn()
    (request,) = server.requests
    assert dict(request.headers)[b"grpc-timeout"] == b"50000u"
    server.answer(request.stream_id, [(b"grpc-status", b"0")])
    server.send()
    assert server.ended == [Ended("token", Status.OK, "", framed(b"answer") if keep else b"")]
    assert server.client.in_flight == 0 and server.client.usable


@pytest.mark.parametrize(
    ("respond", "status", "text"),
    [
        (lambda e, s: e.send_response(s, [*OPENING, (b"grpc-status", b"8"), (b"grpc-message", b"too%20much")],
                                      end_stream=True), Status.RESOURCE_EXHAUSTED, "too much"),
        (lambda e, s: e.send_response(s, [*OPENING, (b"grpc-status", b"0")], end_stream=True), Status.INTERNAL,
         "OK without a message"),
        (lambda e, s: e.send_response(s, OPENING, end_stream=True), Status.UNKNOWN, "no grpc-status"),
        (lambda e, s: e.send_response(s, [*OPENING, (b"grpc-status", b"99")], end_stream=True), Status.UNKNOWN, ""),
        (lambda e, s: e.send_response(s, [(b":status", b"404")], end_stream=True), Status.UNIMPLEMENTED, "HTTP 404"),
        (lambda e, s: e.send_response(s, [(b":status", b"503")]), Status.UNKNOWN, "HTTP 503"),
        (lambda e, s: e.reset_stream(s, 7), Status.UNAVAILABLE, "HTTP/2 error 7"),
        (lambda e, s: e.reset_stream(s, 8), Status.CANCELLED, "HTTP/2 error 8"),
        (lambda e, s: (e.send_response(s, OPENING), e.send_data(s, framed(b"x"), end_stream=True)), Status.INTERNAL,
         "without a status"),
    ],
)  # fmt: skip
def test_whatever_ends_a_call_ends_it_once(
    serve: Callable[..., Server], respond: Callable[[Any, int], object], status: Status, text: str
) -> None:
    server = serve()
    server.client.start("token", FIELDS, framed(b"question"))
    server.turn()
    respond(server.engine, server.requests[0].stream_id)
    server.send()
    (ended,) = server.ended
    assert (ended.token, ended.status) == ("token", status) and text in ended.text


def test_calls_beyond_the_servers_limit_wait_and_are_counted(serve: Callable[..., Server]) -> None:
    server = serve({MAX_CONCURRENT_STREAMS: 2})
    server.turn()
    for token in range(5):
        server.client.start(token, FIELDS, framed(b"question"))
    server.turn()
    assert len(server.requests) == 2 and server.client.held == 3
    for place in range(5):
        server.answer(server.requests[place].stream_id, [(b"grpc-status", b"0")])
        server.send()
    assert [call.token for call in server.ended] == [0, 1, 2, 3, 4]
    assert server.client.held == 0


def test_a_server_that_goes_away_refuses_later_calls_and_answers_earlier_ones(serve: Callable[..., Server]) -> None:
    server = serve()
    server.client.start("first", FIELDS, framed(b"question"))
    server.turn()
    first = server.requests[0].stream_id
    server.client.start("second", FIELDS, framed(b"question"))
    server.engine.send_goaway(0, last_stream_id=first)
    server.send()
    assert not server.client.usable
    server.client.start("third", FIELDS, framed(b"question"))
    server.answer(first, [(b"grpc-status", b"0")])
    server.send()
    found = {call.token: call.status for call in server.ended}
    assert found == {"first": Status.OK, "second": Status.UNAVAILABLE, "third": Status.UNAVAILABLE}


def test_a_connection_that_is_closed_fails_what_is_in_flight(serve: Callable[..., Server]) -> None:
    server = serve()
    server.client.start("token", FIELDS, framed(b"question"))
    server.turn()
    server.socket.close()
    while not server.ended:
        server.ended += server.client.receive()
    assert server.ended[0].status == Status.UNAVAILABLE and server.client.lost and not server.client.in_flight


def test_what_is_no_http2_fails_what_is_in_flight(serve: Callable[..., Server]) -> None:
    server = serve()
    server.client.start("token", FIELDS, framed(b"question"))
    server.client.flush()
    server.socket.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 10)
    while not server.ended:
        server.ended += server.client.receive()
        server.client.flush()
    assert server.ended[0].status == Status.UNAVAILABLE and not server.client.usable


def test_a_deadline_is_at_least_a_microsecond_and_at_most_eight_digits() -> None:
    assert [timeout_field(us)[1] for us in (-5, 0, 1, 50_000, 10**12)] == [b"1u", b"1u", b"1u", b"50000u", b"99999999u"]


def test_numbers_of_streams_end(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    def used_up(*_: Any) -> int:
        raise client_connection.NGH2Error("no stream is left")

    monkeypatch.setattr(server.client, "_engine", type("Engine", (), {"send_request": staticmethod(used_up)})())
    server.client.start("token", FIELDS, framed(b"question"))
    assert not server.client.usable and server.client.in_flight == 1
    assert server.client.fail_all(Status.CANCELLED, "") == [Ended("token", Status.UNAVAILABLE, "no stream is left")]
