"""Where a server listens, asked from each side: dual-stack, a name, and a file for processes of this machine."""

from __future__ import annotations

import contextlib
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest

from forwardpass import Client
from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
ROW = np.ones((1, 2), np.float32)


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.fixture(params=["direct", "grpcio"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    models.save(tmp_path / "models", "echo", models.echo())
    return tmp_path / "models"


def _answers(address: str) -> bool:
    with Client(address, attempts=1) as client:
        return bool((client.predict("echo", ROW) == ROW).all())


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "[::]"])
def test_every_interface_is_ipv4_and_ipv6(repository: Path, transport: str, host: str, serve: Serve) -> None:
    server = serve(repository, "--host", host, "--transport", transport, "--health-port", "0")
    port = server.address.rpartition(":")[2]
    assert server.address == f"[::]:{port}"
    assert _answers(f"127.0.0.1:{port}")
    assert _answers(f"[::1]:{port}")
    for line, words in (("health ", ":"), ("metrics ", ":")):
        said = next(text for text in server.lines if text.startswith(line))
        other = int(said.rpartition(words)[2].partition("/")[0])
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, other), 20).close()


def test_a_name_is_every_address_of_it(repository: Path, transport: str, serve: Serve) -> None:
    server = serve(repository, "--host", "localhost", "--transport", transport)
    port = int(server.address.removeprefix("localhost:"))
    for info in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        socket.create_connection(info[4][:2], 20).close()
    assert _answers(server.address)


def test_a_socket_file_is_for_owner_and_group_and_goes_with_the_server(
    repository: Path, transport: str, tmp_path: Path, serve: Serve
) -> None:
    path = tmp_path / "socket"
    server = serve(repository, "--host", f"unix:{path}", "--transport", transport)
    assert server.address == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert _answers(server.address)
    assert "http://localhost:" in server.metrics_url and "forwardpass_ready 1.0" in server.metrics()
    with Client(server.address) as client:
        assert "system_shared_memory" in client.server().extensions
    with pytest.raises(ForwardpassError, match="a server listens on"):
        ServerProcess(repository, "--host", f"unix:{path}", "--transport", transport)
    assert _answers(server.address), "the one that was there goes on"
    assert server.stop() == 0
    assert not path.exists()


def test_a_socket_file_of_a_dead_server_is_replaced(
    repository: Path, transport: str, tmp_path: Path, serve: Serve
) -> None:
    path = tmp_path / "socket"
    serve(repository, "--host", f"unix://{path}", "--transport", transport).kill()
    assert path.exists()
    assert _answers(serve(repository, "--host", f"unix:{path}", "--transport", transport).address)


def test_a_file_that_is_no_socket_stays(repository: Path, transport: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(ForwardpassError, match="is not a socket"):
        ServerProcess(repository, "--host", f"unix:{path}", "--transport", transport)
    assert path.read_text() == "mine"
