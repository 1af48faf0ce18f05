"""What hostile HTTP clients try, against a whole server: nobody else is harmed, and the server keeps its bounds."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, until
from http_caller import HttpCaller, received, tensor

from forwardpass.testing.server_process import ServerProcess

GOOD = {"inputs": [tensor(np.arange(8, dtype=np.float32).reshape(2, 4))]}
BODY = json.dumps(GOOD).encode()
MIB = 1 << 20
HALF = r"\ud800"  # half of a surrogate pair, which JSON can write and no message can hold
NAN_INPUT = '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [NaN, 1, 2, 3]%s}]%s}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), "max_batch_size = 64\n")
    with ServerProcess(root, "--max-bytes", str(24 * MIB)) as running:
        yield running
        assert running.stop() == 0, running.tail()
        assert not [line for line in running.lines if "Traceback" in line or "WebSocket" in line], running.tail()


@pytest.fixture
def http(server: ServerProcess) -> Iterator[HttpCaller]:
    caller, grpc = HttpCaller(server.http_url), Caller(server)
    before = caller.infer("chain", GOOD).body
    yield caller
    assert caller.infer("chain", GOOD).body == before
    until(grpc.idle, "an idle server")
    grpc.close()
    caller.close()


def post(*more: str, body: bytes = BODY, length: bool = True) -> bytes:
    lines = ["POST /v2/models/chain/infer HTTP/1.1", "Host: t", *more]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/chain/infer", NAN_INPUT % (f', "parameters": {{"{HALF}": 1}}', "")),
        ("/v2/models/chain/infer", NAN_INPUT % ("", f', "parameters": {{"{HALF}": 1}}')),
        ("/v2/repository/models/chain/load", f'{{"parameters": {{"{HALF}": 1}}, "x": NaN}}'),
        ("/v2/logging", f'{{"{HALF}": "NaN"}}'),
        ("/v2/trace/setting", f'{{"{HALF}": "NaN"}}'),
    ],
    ids=range(5),
)
def test_names_that_no_message_can_hold_are_refused(http: HttpCaller, path: str, body: str) -> None:
    answer = http.post(path, body.encode())
    assert answer.status == 400 and "half of a surrogate pair" in answer.error


def test_a_number_out_of_range_is_named_beside_nan(http: HttpCaller) -> None:
    answer = http.infer("chain", (NAN_INPUT % ("", "")).replace("3]", f"{10**400}]").encode())
    assert answer.status == 400 and answer.error.startswith("input 'x': 1000")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/chain/infer", {"inputs": [{"parameters": dict.fromkeys(map(str, range(1000)))}] * 5}),
        ("/v2/repository/models/chain/load", {"parameters": {str(i): 0 for i in range(2000)}}),
        ("/v2/logging", {str(i): 0 for i in range(2000)}),
        ("/v2/trace/setting", {"trace_level": ["OFF"] * 2000}),
    ],
    ids=range(4),
)  # fmt: skip
def test_entries_are_bounded_before_a_message_is_made(http: HttpCaller, path: str, body: Any) -> None:
    answer = http.post(path, body)
    assert answer.status == 400 and "expected at most" in answer.error


def test_more_lists_than_rows_can_be_are_not_parsed(http: HttpCaller) -> None:
    answer = http.infer("chain", b"[" + b"[]," * (MIB + 1) + b"0]")
    assert answer.status == 400 and "lists and objects; expected data in flat lists" in answer.error


def test_bodies_that_inflate_together_are_bounded(http: HttpCaller, server: ServerProcess) -> None:
    """Sixteen bodies of 10 KB, each 10 MB when it is inflated: they are counted, and parsed one at a time."""
    bomb = gzip.compress(b'{"inputs": [' + b'"",' * (3 * MIB) + b"0]}")
    statuses: list[int] = []

    def send() -> None:
        caller = HttpCaller(server.http_url)
        statuses.append(caller.infer("chain", bomb, content_encoding="gzip").status)
        caller.close()

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 16 and set(statuses) == {400, 429}


@pytest.mark.parametrize("framing", ["Transfer-Encoding: xchunked", "Transfer-Encoding: identity"])
def test_bodies_without_an_end_are_refused_with_words(http: HttpCaller, framing: str) -> None:
    with http.connect() as sock:
        sock.sendall(post(framing, length=False))
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1 ") == 1


def test_what_follows_a_request_does_not_take_its_answer(http: HttpCaller) -> None:
    with http.connect() as sock:
        sock.sendall(post() + b"no request at all\r\n\r\n")
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1 ") == 1 and b"connection: close" in answer


def test_trailers_are_no_headers(http: HttpCaller) -> None:
    chunked = b"%x\r\n%s\r\n0\r\nX-Request-Timeout: soon\r\n\r\n" % (len(BODY), BODY)
    with http.connect() as sock:
        sock.sendall(post("Transfer-Encoding: chunked", "Connection: close", body=chunked, length=False))
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("apart", [False, True])
def test_an_upgrade_is_ignored_and_its_body_is_not(http: HttpCaller, apart: bool) -> None:
    """As Java's client sends its first request."""
    head = post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
    with http.connect() as sock:
        cut = len(head) - 7 if apart else len(head)
        sock.sendall(head[:cut])
        if apart:
            sock.sendall(head[cut:])
        sock.sendall(post("Connection: close"))
        answer = received(sock)
    assert answer.count(b"HTTP/1.1 200") == 2


def test_a_head_in_two_parts_may_have_a_large_body_behind_it(http: HttpCaller) -> None:
    head = post(body=BODY + b" " * 200_000)
    with http.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (head[:20], head[20:], post("Connection: close")):
            time.sleep(0.05)  # so that each part is received by itself
            sock.sendall(part)
        answer = received(sock)
    assert answer.count(b"HTTP/1.1 200") == 2


def test_an_error_closes_no_connection_whose_request_came_whole(http: HttpCaller) -> None:
    for path in ("/v2/models/absent", "/absent", "/v2/models/chain/versions/9/stats"):
        answer = http.get(path)
        assert answer.status == 404 and "connection" not in answer.headers


def test_ten_thousand_requests_at_once_are_answered_in_order(http: HttpCaller) -> None:
    count = 10_000
    with http.connect() as sock:
        request = b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n%s\r\n"
        sender = threading.Thread(
            target=sock.sendall, args=(request % b"" * (count - 1) + request % b"Connection: close\r\n",)
        )
        sender.start()
        answer = received(sock)
        sender.join()
    assert answer.count(b'{"live":true}') == count


def test_a_client_that_reads_nothing_is_not_read_far_ahead(http: HttpCaller, server: ServerProcess) -> None:
    """What was sent and not taken stays in the sockets."""
    with http.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(1.0)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 * MIB:
                sent += sock.send(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 10_000)
