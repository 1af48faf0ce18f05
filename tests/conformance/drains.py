"""Two servers that are stopped and started anew by turns, under the calls of a foreign client that asks for no retries.

The client finds out by what its HTTP/2 connections say (GOAWAY, refused connections), for it asks nobody's health.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forwardpass.testing.server_process import ServerProcess

CALLERS = Path(__file__).parent / "callers"
SECONDS = 60.0  # for what is waited for


def answered(server: ServerProcess) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in server.metrics().splitlines()
        if line.startswith("forwardpass_requests_total{") and 'code="OK"' in line
    )


def drain_by_turns(
    repository: Path, request: bytes, folder: Path, client: Sequence[str | Path], drains: int, *options: str
) -> Any:
    """What the client counted. `client`: its command, to which the addresses, the request's file and 16 are added.

    A server is stopped only once the other is being called.
    """
    file = folder / "request.bin"
    file.write_bytes(request)
    with ExitStack() as stack:
        ports = [str(port) for port in free_ports(2)]
        servers = [stack.enter_context(ServerProcess(repository, "--grpc-port", port, *options)) for port in ports]
        command = [*map(str, client), ",".join(server.address for server in servers), str(file), "16"]
        calling = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(calling.kill)
        for turn in range(drains):
            _until(lambda: all(answered(server) > 20 for server in servers), calling)
            going = turn % 2
            assert servers[going].stop(SECONDS) == 0, servers[going].tail()
            servers[going] = stack.enter_context(ServerProcess(repository, "--grpc-port", ports[going], *options))
        _until(lambda: all(answered(server) > 20 for server in servers), calling)
        said, _ = calling.communicate(timeout=SECONDS)
        assert calling.returncode == 0
    return json.loads(said.strip().splitlines()[-1])


def drain_failures(found: Any) -> dict[str, int]:
    """The failures that a client counted but those of a server that starts: it refuses calls while its models load, as
    it must, and only a client that asks for its health sees that before."""
    return {text: count for text, count in found["failed"].items() if "is still loading" not in text}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in found]


def _until(condition: Any, calling: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert calling.poll() is None, f"the client ended with {calling.returncode}"
        assert time.monotonic() < until, "no calls came"
        time.sleep(0.02)
