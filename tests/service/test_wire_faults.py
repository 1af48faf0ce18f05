"""What may be wrong below the messages: with HTTP/2, with compression, with clients that send or read too little.

Over real sockets, to both transports. After every case the server says that it serves, nothing is left in flight, other
clients were served meanwhile, and the next good answer has the bits of the one before.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import http2_frames as http2
import models
import numpy as np
import pytest
from caller import Caller, open_files, request, until
from raw_client import HELLO, RawClient, data_frames

from forwardpass.testing.server_process import ServerProcess

GOOD = request("chain", np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
BODY = GOOD.SerializeToString()
INVALID, EXHAUSTED, UNIMPLEMENTED, INTERNAL = "3", "8", "12", "13"
MIB = 1 << 20


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain())
    models.save(root, "any", models.relu_any_width())
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def sink(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def caller(sink: str, repository: Path) -> Iterator[Caller]:
    with ServerProcess(repository, "--transport", sink, "--max-message-bytes", "1000000") as server:
        made = Caller(server)
        yield made
        made.close()
        assert server.stop() == 0, server.tail()
        if sink == "direct":  # grpcio logs what it could not send to a client that left
            assert not [line for line in server.lines if "Traceback" in line], server.tail()


@pytest.fixture(autouse=True)
def unharmed(caller: Caller) -> Iterator[None]:
    before, _ = caller.send(GOOD)
    caller.health()
    files = open_files(caller.server.pid)
    yield
    assert caller.health() == "SERVING"
    until(caller.idle, "an idle server")
    assert caller.send(GOOD)[0] == before
    until(lambda: open_files(caller.server.pid) <= files, "the end of the connections")


@pytest.fixture
def raw(caller: Caller) -> Iterator[RawClient]:
    made = RawClient(caller.server.address)
    yield made
    made.close()


def peak(server: ServerProcess) -> int:
    """The most memory that the server has had, in bytes; told anew from here on."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    most = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    return most


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(range(256)) * 10,
        http2.PREFACE + bytes(range(256)) * 10,
        HELLO + b"\xff" * 1000,
    ],
    ids=["HTTP/1", "TLS hello", "junk", "junk after the preface", "a frame of 16 MB"],
)
def test_what_is_not_http2_ends_its_own_connection(caller: Caller, raw: RawClient, data: bytes) -> None:
    raw.send(data)
    assert caller.send(GOOD)
    raw.socket.shutdown(1)
    with contextlib.suppress(Exception):  # whatever it says, it ends
        list(raw.frames())
    raw.socket.settimeout(30)
    with contextlib.suppress(ConnectionError):
        while raw.socket.recv(65536):
            pass


def test_a_message_that_claims_four_gigabytes(caller: Caller, raw: RawClient) -> None:
    """Refused by what it claims; no memory is taken for it."""
    peak(caller.server)
    raw.send(HELLO, raw.headers(1), http2.frame(http2.DATA, 0, 1, struct.pack(">BI", 0, 0xFFFFFFFF) + b"x" * 1000))
    assert raw.status(1) == EXHAUSTED
    assert peak(caller.server) < 300 * MIB


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """Made before its client connects: it takes seconds, and a client that says nothing for 10 is closed."""
    made = gzip.compress(bytes(500 * MIB), 6)
    assert len(made) < 600_000
    return made


def test_a_gzip_bomb(caller: Caller, bomb: bytes, raw: RawClient) -> None:
    """Half a megabyte that would be 500: refused, and it is never there."""
    before = peak(caller.server)
    raw.send(HELLO, raw.headers(1, grpc_encoding="gzip"))
    # Within the first window of a call, so that no window needs to be waited for.
    body = struct.pack(">BI", 1, len(bomb)) + bomb
    raw.send(data_frames(1, body[:60_000], end=False))
    for kind, _, stream, payload in raw.frames():
        if (kind == http2.WINDOW_UPDATE and stream == 1) or kind == http2.SETTINGS:
            break
        assert kind != http2.HEADERS, payload
    raw.send(data_frames(1, body[60_000:]))
    assert raw.status(1) in (EXHAUSTED, "reset 3")  # grpcio's window is smaller
    assert peak(caller.server) - before < 64 * MIB


@pytest.mark.parametrize(
    ("compressed", "more", "statuses"),
    [
        (1, {}, {INTERNAL}),
        (1, {"grpc_encoding": "br"}, {UNIMPLEMENTED, INTERNAL}),  # grpcio cannot tell
        (1, {"grpc_encoding": "gzip"}, {INTERNAL}),
        (0, {"grpc_timeout": "soon"}, {INTERNAL, "0"}),  # grpcio leaves it out of account
    ],
    ids=["a flag without encoding", "an unknown encoding", "no gzip", "no timeout"],
)
def test_compression_and_timeouts_that_are_none(
    raw: RawClient, compressed: int, more: dict[str, str], statuses: set[str]
) -> None:
    """The call ends with a status, and the connection serves the next one."""
    raw.send(HELLO, raw.call(1, BODY, compressed, **more))
    assert raw.status(1) in statuses
    raw.send(raw.call(3, BODY))
    assert raw.status(3) == "0"


def test_metadata_over_the_limit(caller: Caller) -> None:
    """By names, values and what HTTP/2 adds; the next call of the connection is served."""
    refused = caller.refused(GOOD, metadata=(("x-large", "v" * 40_000),))
    assert refused.code == "RESOURCE_EXHAUSTED" and "metadata" in refused.text
    assert caller.send(GOOD, metadata=(("x-small", "v" * 4_000),))


@pytest.mark.parametrize(
    "body",
    [b"", b"\0", b"\0\0\0\0", struct.pack(">BI", 0, 100) + b"half"],
    ids=["empty", "a byte", "four bytes", "half a message"],
)
def test_a_body_that_ends_too_early(raw: RawClient, body: bytes) -> None:
    """It ends with a status, at once."""
    raw.send(HELLO, raw.headers(1), http2.frame(http2.DATA, http2.END_STREAM, 1, body))
    assert raw.status(1) in (INVALID, INTERNAL, "reset 2", "closed")


def test_what_is_no_call_of_grpc(sink: str, raw: RawClient) -> None:
    if sink == "grpcio":
        pytest.skip("grpcio resets what is no call of gRPC in ways of its own")
    raw.send(HELLO, raw.headers(1, flags=5, content_type="text/html"))
    assert raw.status(1) == "http 415"
    raw.send(raw.call(3, BODY))
    assert raw.status(3) == "0"


def test_a_flood_of_pings(caller: Caller, raw: RawClient) -> None:
    """Also one whose answers are never read."""
    ping = http2.frame(http2.PING, 0, 0, b"12345678")
    raw.send(HELLO)
    raw.socket.settimeout(0.2)
    with contextlib.suppress(TimeoutError, OSError):
        for _ in range(200):
            raw.socket.sendall(ping * 1000)
    assert caller.send(GOOD)


def test_calls_that_are_reset_at_once(caller: Caller, raw: RawClient) -> None:
    """Three thousand of them: nothing stays, and others are served."""
    raw.send(HELLO)
    for start in range(1, 6001, 200):
        raw.send(*[raw.call(s, BODY) + http2.reset(s, 8) for s in range(start, start + 200, 2)])
    assert caller.send(GOOD)


def test_calls_that_are_reset_before_they_began(caller: Caller, raw: RawClient) -> None:
    """As gRPC's C core sends it before 1.85: the other calls of the connection are answered; without end, it ends."""
    raw.send(HELLO, raw.call(1, BODY), http2.reset(3, 8), http2.reset(5, 8), raw.call(7, BODY))
    assert {raw.status(1), raw.status(7)} == {"0"}
    raw.send(http2.reset(9, 8) * 100_000)
    assert caller.send(GOOD)


def test_calls_that_never_say_more(caller: Caller) -> None:
    """Begun and left, on one connection up to its limit, and on many: other clients are served."""
    one = RawClient(caller.server.address)
    one.send(HELLO, *[one.headers(s) for s in range(1, 2001, 2)])
    many = [RawClient(caller.server.address) for _ in range(100)]
    for client in many:
        client.send(HELLO, client.headers(1), http2.frame(http2.DATA, 0, 1, b"\0\0\0"))
    for _ in range(10):
        assert caller.send(GOOD)
    for client in (one, *many):
        client.close()


def test_a_call_that_comes_byte_by_byte(raw: RawClient) -> None:
    data = HELLO + raw.call(1, BODY)
    for i in range(len(data)):
        raw.send(data[i : i + 1])
    assert raw.status(1) == "0"


def test_a_client_that_does_not_read(caller: Caller, raw: RawClient, sink: str) -> None:
    """Its answers wait within bounds; when it reads, every one is there."""
    x = np.ones((100, 600), np.float32)
    body = request("any", x).SerializeToString()
    window = http2.settings(initial_window_size=(1 << 31) - 1) + http2.window_update(0, (1 << 31) - 1 - 65535)
    raw.greet(window)
    sent = 0
    raw.socket.settimeout(0.5)
    before = peak(caller.server)
    with contextlib.suppress(TimeoutError):
        for _ in range(60):
            raw.socket.sendall(raw.call(2 * sent + 1, body))
            sent += 1
    assert sent
    assert caller.send(GOOD)
    assert peak(caller.server) - before < 100 * MIB
    if sink == "grpcio":
        return  # the raw client minds no window, which grpcio answers in ways of its own
    raw.socket.settimeout(30)
    answered = 0
    for kind, flags, _, payload in raw.frames():
        if kind == http2.HEADERS and flags & http2.END_STREAM:
            assert payload["grpc-status"] == "0"
            answered += 1
            if answered == sent:
                break
    assert answered == sent


def test_no_descriptor_is_left(sink: str, repository: Path) -> None:
    """Those who are connected are served; when others have gone, there is room again."""
    if sink == "grpcio":
        pytest.skip("grpcio accepts by its own rules")
    with ServerProcess(repository, "--transport", sink) as server:
        caller = Caller(server)
        assert caller.send(GOOD)
        room = open_files(server.pid) + 10
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (room, room))
        clients = [RawClient(server.address) for _ in range(30)]
        until(lambda: any("no connection can be accepted" in line for line in server.lines), "a word about it")
        assert caller.send(GOOD)
        for client in clients:
            client.close()
        other = Caller(server)
        assert other.send(GOOD, timeout=30)
        other.close()
        caller.close()


DYING = """
import os, sys
sys.path.insert(0, sys.argv[3])
from raw_client import HELLO, RawClient
client = RawClient(sys.argv[1])
body = bytes.fromhex(sys.argv[2])
client.send(HELLO, *[client.call(s, body) for s in range(1, 401, 2)])
os.kill(os.getpid(), 9)
"""


def test_a_client_that_dies_with_its_answers_on_the_way(caller: Caller) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", DYING, caller.server.address, BODY.hex(), here]
    for _ in range(5):
        assert subprocess.run(command, timeout=60, env={**os.environ}).returncode == -9
    assert caller.send(GOOD)
