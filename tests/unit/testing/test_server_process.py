"""What is told of a server that never gets ready, and that none is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_that_cannot_start_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ForwardpassError, match=r"ended before it was ready:\n.*is not a folder"):
        ServerProcess(tmp_path / "nothing")


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    kill = ServerProcess.kill
    monkeypatch.setattr(ServerProcess, "kill", lambda self: (started.append(self.pid), kill(self)))
    with pytest.raises(ForwardpassError, match=r"is not ready after 0\.01 s"):
        ServerProcess(tmp_path, patience=0.01)
    assert gone(started[0])


def test_a_server_is_stopped_however_the_context_is_left(document_repository: Path) -> None:
    with pytest.raises(ZeroDivisionError), ServerProcess(document_repository) as server:
        assert server.returncode is None
        assert "forwardpass_ready 1.0" in server.metrics()
        raise ZeroDivisionError
    assert server.returncode == 0 and gone(server.pid)
    assert server.lines[-1] == "stopped"


def test_a_server_that_hangs_is_killed_and_told_of(document_repository: Path) -> None:
    with ServerProcess(document_repository) as server:
        server.send(signal.SIGSTOP)
        with pytest.raises(ForwardpassError, match=r"did not end within 0\.2 s:\n(.*\n)*ready(\n|$)"):
            server.stop(0.2)
        assert server.returncode == -signal.SIGKILL
