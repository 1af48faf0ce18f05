"""Four gRPC libraries at once call a server of two processes, while one of these is killed or all are renewed.

No client asks for retries: what fails is what was under way on the killed process, and nothing when they are renewed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conformance.clients import CLIENTS
from tests.conformance.drains import CALLERS, answered
from tests.service.caller import until, workers

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

LIBRARIES = ("python", "go", "node", "c++")
IN_FLIGHT = 16  # calls of each client
KILLS, RENEWALS = 4, 20
CALLS_BETWEEN = 500.0

pytestmark = pytest.mark.slow


@contextmanager
def calling(server: ServerProcess, folder: Path) -> Iterator[dict[str, Any]]:
    """All clients call while inside; what each counted is in the dictionary afterwards."""
    message = protocol.ModelInferRequest(model_name="digits")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    message.raw_input_contents.append(np.zeros((1, 64), np.float32).tobytes())
    file = folder / "request.bin"
    file.write_bytes(message.SerializeToString())
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        running = {}
        for library in LIBRARIES:
            home = folder / library
            home.mkdir()
            command = [
                *map(str, CLIENTS[library](CALLERS / "callers", home)),
                server.address,
                str(file),
                str(IN_FLIGHT),
            ]
            running[library] = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(running[library].kill)
        yield found
        for library, process in running.items():
            said, _ = process.communicate(timeout=60.0)
            assert process.returncode == 0
            found[library] = json.loads(said.strip().splitlines()[-1])
    print(found)


def more_answers(server: ServerProcess) -> None:
    before = answered(server)
    until(lambda: answered(server) > before + CALLS_BETWEEN, "answers")


def test_a_killed_process_costs_the_calls_that_were_under_way_on_it(digits_repository: Path, tmp_path: Path) -> None:
    with ServerProcess(digits_repository, "--processes", "2") as server:
        with calling(server, tmp_path) as found:
            more_answers(server)
            for turn in range(KILLS):
                os.kill(workers(server)[turn % 2], signal.SIGKILL)
                until(lambda n=turn: sum("replaced in" in line for line in server.lines) > n, "another process")  # type: ignore[misc]
                more_answers(server)
        times = [float(line.split("replaced in ")[1].split()[0]) for line in server.lines if "replaced in" in line]
        print("seconds until replaced:", times)
    for library, counted in found.items():
        assert counted["ok"] > CALLS_BETWEEN, library
        assert sum(counted["failed"].values()) <= KILLS * IN_FLIGHT, (library, counted)


def test_renewal_costs_no_call(digits_repository: Path, tmp_path: Path) -> None:
    with ServerProcess(digits_repository, "--processes", "2") as server:
        with calling(server, tmp_path) as found:
            for turn in range(RENEWALS):
                more_answers(server)
                server.send(signal.SIGHUP)
                until(lambda n=turn: sum(": replaced" in line for line in server.lines) == 2 * (n + 1), "new processes")  # type: ignore[misc]
        assert "NOT replaced" not in "\n".join(server.lines)
    for library, counted in found.items():
        assert counted["ok"] > 0 and counted["failed"] == {}, library
