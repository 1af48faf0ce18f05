"""A port that accepts nothing any more ends the process for a restart, and health says so first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import http2_frames as http2
import models
import numpy as np
import pytest
from caller import Caller, request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_client import HELLO, RawClient, data_frames

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
GOOD = request("chain", np.ones((1, 4), np.float32))

# Put where every Python looks at its start. SIGUSR2 has the system end the listener of the port that a file names: no
# client can do that.
SITE = """
import os, signal, socket
def end(*_):
    port = int(open({file!r}).read())
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with found:
            listens = found.family == socket.AF_INET and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and found.getsockname()[1] == port:
                found.shutdown(socket.SHUT_RDWR)
signal.signal(signal.SIGUSR2, end)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    models.save(tmp_path / "models", "chain", models.chain())
    return tmp_path / "models"


def path_that_is_no_text(stream: int) -> bytes:
    """A call whose path is not UTF-8."""

    def field(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    block = b"\x83\x86" + field(b":path", b"/\xff\xfe/x") + field(b":authority", b"test")
    block += field(b"te", b"trailers") + field(b"content-type", b"application/grpc")
    return http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block) + data_frames(stream, bytes(5))


def test_a_path_that_is_no_text_is_an_unknown_method(repository: Path, serve: Serve) -> None:
    server = serve(repository, "--transport", "direct")
    client, caller = RawClient(server.address), Caller(server)
    client.send(HELLO, path_that_is_no_text(1))
    assert client.status(1) == "12"
    assert caller.send(GOOD) and server.returncode is None
    client.close()
    caller.close()


def test_a_loop_of_grpcio_that_ends_ends_the_process(repository: Path, serve: Serve) -> None:
    """One such path is enough for it. Who watches health on the port for probes hears of it."""
    server = serve(repository, "--transport", "grpcio", "--health-port", "0")
    probed = next(line.split()[1] for line in server.lines if line.startswith("health "))
    heard: list[int] = []
    with grpc.insecure_channel(probed) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        heard.append(next(stream).status)

        def listen() -> None:
            try:
                heard.extend(response.status for response in stream)
            except grpc.RpcError:
                return

        thread = threading.Thread(target=listen)
        thread.start()
        client = RawClient(server.address)
        client.send(HELLO, path_that_is_no_text(1))
        assert server.wait() == 1
        thread.join(30)
        client.close()
    assert heard == [1, 2], "SERVING, NOT_SERVING"
    said = [line for line in server.lines if line.startswith("the gRPC port serves no more")]
    assert len(said) == 1 and said[0].endswith("the server exits, so that it can be restarted")


@pytest.mark.parametrize(("transport", "port"), [("direct", "grpc"), ("direct", "metrics"), ("grpcio", "metrics")])
def test_a_listener_that_is_gone_ends_the_process(
    repository: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, port: str
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(file=str(tmp_path / "port")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    server = serve(repository, "--transport", transport)
    caller = Caller(server)
    assert caller.send(GOOD)
    address = server.address if port == "grpc" else server.metrics_url.removesuffix("/metrics")
    (tmp_path / "port").write_text(address.rpartition(":")[2])
    server.send(signal.SIGUSR2)
    assert server.wait() == 1
    assert [line for line in server.lines if f"the {'gRPC' if port == 'grpc' else port} port serves no more" in line]
    caller.close()
