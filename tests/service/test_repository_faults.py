"""What happens to a server whose repository cannot be read for a while, or holds what cannot be served."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from caller import Caller, outputs, request, until

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

ROW = np.ones((1, 4), np.float32)


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_idle_connections_of_a_stranger_unload_nothing(tmp_path: Path, serve: Serve, transport: str) -> None:
    """They take the descriptors that listing the repository needs."""
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, "--model-control", "poll", "--poll-seconds", "0.1", "--transport", transport)
    caller = Caller(server)
    before = outputs(caller.send(request("m", ROW))[0])[0].tobytes()
    host, _, port = server.address.rpartition(":")
    free = 10
    limit = len(list(Path(f"/proc/{server.pid}/fd").iterdir())) + free
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((host, int(port))))
        until(lambda: "cannot be read: Too many open files" in "\n".join(server.lines), "a look that fails")
        seen = len(server.lines)
        until(lambda: outputs(caller.send(request("m", ROW))[0])[0].tobytes() == before, "an answer")
    until(lambda: "can be read again" in "\n".join(server.lines[seen:]), "a look that works")
    assert not [line for line in server.lines if "unloaded" in line or "not on disk" in line]
    assert outputs(caller.send(request("m", ROW))[0])[0].tobytes() == before
    assert caller.metric("forwardpass_repository_errors_total") > 0
    caller.close()
