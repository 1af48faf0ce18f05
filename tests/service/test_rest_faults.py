"""What HTTP clients do wrong, or do to others: the status, its words, and nobody is harmed.

After every case the server is ready, holds nothing, and the next good answer is that of before.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, open_files, until
from http_caller import HttpCaller, received, tensor

from forwardpass.testing.server_process import ServerProcess

GOOD = {"inputs": [tensor(np.arange(8, dtype=np.float32).reshape(2, 4))]}
LIMIT = 100_000  # --max-message-bytes
HEAD = 4096  # --max-metadata-bytes
TURNS = 1_500_000.0  # of `hold`: a second or more


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), "max_batch_size = 64\n")
    models.save(root, "hold", models.hold(), "max_batch_size = 4\nmax_queue_requests = 2\ninstances = 1\n")
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ServerProcess]:
    options = ["--max-message-bytes", str(LIMIT), "--max-metadata-bytes", str(HEAD), "--inline-run-limit", "0"]
    with ServerProcess(repository, *options) as running:
        yield running
        assert running.stop() == 0, running.tail()
        assert not [line for line in running.lines if "Traceback" in line or "Exception" in line], running.tail()


@pytest.fixture
def grpc(server: ServerProcess) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


@pytest.fixture
def http(server: ServerProcess, grpc: Caller) -> Iterator[HttpCaller]:
    caller = HttpCaller(server.http_url)
    before = caller.infer("chain", GOOD).body
    yield caller
    after = HttpCaller(server.http_url)
    assert after.get("/v2/health/ready").status == 200
    assert after.infer("chain", GOOD).body == before
    until(grpc.idle, "an idle server")
    after.close()
    caller.close()


def head(path: str, length: int | str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


def hold(turns: float = TURNS) -> dict[str, Any]:
    return {"inputs": [tensor(np.full((1, 1), turns, np.float32))]}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 50_000, 400, "the body is not JSON"),
        (b'{"inputs": NaN}', 400, "inputs: expected a list of tensors, got NaN"),
        ({"inputs": [tensor(np.zeros((1, 3)))]}, 400, "input 'x': expected shape [-1,4], got [1,3]"),
        ({"inputs": [tensor(np.zeros((1, 4)), "FP64")]}, 400, "input 'x': expected datatype FP32, got 'FP64'"),
        ({"inputs": [tensor(np.zeros((1, 4)), name="z")]}, 400, "unexpected input 'z'"),
        (GOOD | {"outputs": [{"name": "z"}]}, 400, "unknown output 'z'"),
        (GOOD | {"parameters": {"sequence_id": 3}}, 400, "sequence_id"),
        (b"x" * (LIMIT + 1), 413, f"the body has {LIMIT + 1} bytes, the limit is {LIMIT}"),
        (gzip.compress(b" " * 10_000_000), 413, f"more than {LIMIT} bytes when it is inflated"),
    ],
    ids=range(11),
)
def test_bodies_that_are_refused(http: HttpCaller, body: Any, status: int, text: str) -> None:
    zipped = isinstance(body, bytes) and body[:2] == b"\x1f\x8b"
    answer = http.infer("chain", body, **({"content_encoding": "gzip"} if zipped else {}))
    assert answer.status == status and text in answer.error, answer


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(http: HttpCaller) -> None:
    with http.connect() as sock:
        sock.sendall(head("/v2/models/chain/infer", 10**12, "Expect: 100-continue"))
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer and b"100" not in answer[:40]


def test_a_body_in_chunks_is_bounded_too(http: HttpCaller) -> None:
    body = json.dumps(GOOD).encode()
    with http.connect() as sock:
        start = b"POST /v2/models/chain/infer HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(start + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        sock.sendall(start)
        for _ in range(LIMIT // 10_000 + 2):
            sock.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1 413") == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a client that speaks TLS", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nBad Header\r\n\r\n", b"400"),
        (b"POST /v2/models/chain/infer HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET /" + b"a" * (HEAD + 10), b"431"),
        (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * HEAD, b"431"),
        (b"GET /v2 HTTP/1.1\r\nbig: " + b"a" * 10 * HEAD + b"\r\n\r\n", b"431"),
    ],
    ids=range(8),
)
def test_heads_that_are_refused(http: HttpCaller, data: bytes, status: bytes) -> None:
    with http.connect() as sock:
        sock.sendall(data)
        answer = received(sock)
    assert answer.startswith(b"HTTP/1.1 " + status) and b'{"error":"' in answer


def test_requests_on_one_connection_are_answered_in_order(http: HttpCaller) -> None:
    count = 50
    bodies = [json.dumps(GOOD | {"id": str(i)}).encode() for i in range(count)]
    with http.connect() as sock:
        sock.sendall(b"".join(head("/v2/models/chain/infer", len(body)) + body for body in bodies))
        data = b""
        while data.count(b'"outputs"') < count:
            data += sock.recv(65536)
    places = [data.index(b'"id":"%d"' % i) for i in range(count)]
    assert places == sorted(places)


def test_a_client_that_hangs_up_has_cancelled(http: HttpCaller, grpc: Caller) -> None:
    body = json.dumps(hold()).encode()
    cancelled = grpc.metric("forwardpass_requests_total", code="CANCELLED", model="hold")
    running = http.connect()
    running.sendall(head("/v2/models/hold/infer", len(body)) + body)
    until(lambda: grpc.metric("forwardpass_running_requests", model="hold") == 1, "the long run")
    waiting = http.connect()
    waiting.sendall(head("/v2/models/hold/infer", len(body)) + body)
    until(lambda: grpc.metric("forwardpass_queue_requests", model="hold") == 1, "the queue")
    for sock in (waiting, running):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        sock.close()
    until(lambda: grpc.metric("forwardpass_queue_requests", model="hold") == 0, "its cancellation")
    until(lambda: grpc.metric("forwardpass_requests_total", code="CANCELLED", model="hold") > cancelled, "its count")


def test_a_deadline(http: HttpCaller) -> None:
    for text in ("0.05", "50ms", "50000us", "0"):
        answer = http.infer("hold", hold(), x_request_timeout=text)
        assert answer.status == 504 and answer.error
    for text in ("soon", "-1", "1h", "1e3", ""):
        answer = http.infer("chain", GOOD, x_request_timeout=text)
        assert answer.status == 400 and "X-Request-Timeout: expected seconds" in answer.error
    assert http.infer("chain", GOOD, x_request_timeout="60").status == 200


def test_a_full_queue_says_when_to_come_back(http: HttpCaller, grpc: Caller, server: ServerProcess) -> None:
    answers: list[Any] = []

    def ask(turns: float) -> None:
        caller = HttpCaller(server.http_url)
        answers.append(caller.infer("hold", hold(turns)))
        caller.close()

    threads = [threading.Thread(target=ask, args=(TURNS,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status == 429]
    assert refused and {answer.status for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
        assert "max_queue_requests" in answer.error or "wait" in answer.error


def test_connections_that_do_nothing_hold_up_nobody(http: HttpCaller, server: ServerProcess) -> None:
    before = open_files(server.pid)
    idle = [http.connect() for _ in range(200)]
    for i, sock in enumerate(idle):
        sock.sendall((b"", b"GE", head("/v2/models/chain/infer", 100), b"GET /v2 HTTP/1.1\r\na")[i % 4])
    assert http.infer("chain", GOOD).status == 200
    for sock in idle:
        sock.close()
    until(lambda: open_files(server.pid) <= before, "closed connections")


def test_a_drain(repository: Path) -> None:
    with ServerProcess(repository, "--inline-run-limit", "0") as server:
        grpc, http = Caller(server), HttpCaller(server.http_url)
        body = json.dumps(hold()).encode()
        with http.connect() as sock:
            sock.sendall(head("/v2/models/hold/infer", len(body)) + body)
            until(lambda: grpc.metric("forwardpass_running_requests", model="hold") == 1, "the long run")
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            answer = received(sock)
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
        stopping.join()
        assert server.returncode == 0
        grpc.close()


def test_a_port_that_is_taken_is_named(repository: Path, server: ServerProcess) -> None:
    port = server.http_url.rpartition(":")[2]
    command = [sys.executable, "-m", "forwardpass", "serve", str(repository), "--grpc-port", "0", "--http-port", port]
    done = subprocess.run([*command, "--metrics-port", "-1"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and f"cannot listen on 127.0.0.1:{port} for HTTP" in done.stderr
    assert "--http-port" in done.stderr and "Traceback" not in done.stderr


def test_no_port_with_a_socket_file(repository: Path, tmp_path: Path) -> None:
    with ServerProcess(repository, "--host", f"unix:{tmp_path}/socket") as server:
        assert not server.http_url


def test_a_loop_that_turns_out_long_holds_up_nobody_else(repository: Path) -> None:
    with ServerProcess(repository, "--grace", "0.5") as server:
        grpc, http, other = Caller(server), HttpCaller(server.http_url), HttpCaller(server.http_url)
        for _ in range(20):  # short runs, by which a long one would be predicted short
            assert http.infer("hold", hold(1.0)).status == 200
        body = json.dumps(hold(10 * TURNS)).encode()
        with http.connect() as sock:
            sock.sendall(head("/v2/models/hold/infer", len(body)) + body)
            until(lambda: grpc.metric("forwardpass_running_requests", model="hold") == 1, "the long run")
            assert other.get("/v2/health/live").status == 200
            assert other.infer("chain", GOOD).status == 200
            grpc.infer("chain", np.zeros((1, 4), np.float32))
            assert grpc.metric("forwardpass_running_requests", model="hold") == 1, "they were answered meanwhile"
        for caller in (grpc, http, other):
            caller.close()
