"""A server's life: what it loads and what it will not, what it says meanwhile, how it stops, and what it weighs."""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import models
import numpy as np
import onnx
import pytest
from caller import Caller, Refused, outputs, request, until

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

TURNS = 1_000_000.0  # of `hold`: most of a second, and more where the machine is busy
NONE = np.zeros((1, 1), np.float32)
ROW = np.ones((1, 4), np.float32)
COMMAND = [sys.executable, "-m", "forwardpass", "serve"]
PORTS = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]

transports = pytest.mark.parametrize("transport", ["direct", "grpcio"])


def slow_start() -> onnx.ModelProto:
    """y = x after twenty thousand turns of a loop, whatever x is: loading it runs it a few dozen times."""
    model = models.hold()
    for node in model.graph.node:
        if node.op_type == "Loop":
            node.input[0] = "fixed"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(20_000), "fixed"))
    return model


def refused_start(*arguments: str) -> str:
    """What a server that cannot start says on its last line. It must end by itself, with status 1."""
    done = subprocess.run(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done.stderr
    return (done.stderr or done.stdout).strip().splitlines()[-1]


class Starting:
    """A server that need not be ready yet; its lines can be waited for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        self.address = self.metrics_url = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def wait_for(self, pattern: str) -> re.Match[str]:
        while True:
            line = self._lines.get(timeout=60)
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found


@contextlib.contextmanager
def starting(repository: Path, *options: str) -> Iterator[Starting]:
    process = subprocess.Popen(
        [*COMMAND, str(repository), *PORTS, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        server = Starting(process)
        server.address = server.wait_for(r"^grpc (\S+)")[1]
        server.metrics_url = server.wait_for(r"^metrics (\S+)")[1]
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, server.seen
    finally:
        process.kill()
        process.communicate()


@transports
def test_while_a_model_loads_it_is_unavailable_and_others_serve(tmp_path: Path, transport: str) -> None:
    models.save(tmp_path, "a_quick", models.echo())
    models.save(tmp_path, "b_slow", slow_start(), "max_batch_size = 64\n")
    with starting(tmp_path, "--transport", transport, "--max-batch-size", "64") as server:
        server.wait_for(r"^model a_quick version 1: batches")
        caller = Caller(server)  # type: ignore[arg-type]  # all it needs is the address
        early = caller.refused(request("b_slow", NONE))
        assert early.code == "UNAVAILABLE" and "version 1 of model 'b_slow' is still loading" in early.text
        assert early.retry_after() is not None
        assert outputs(caller.send(request("a_quick", np.ones((1, 2), np.float32)))[0])
        assert (caller.health(), caller.health("b_slow")) == ("NOT_SERVING", "NOT_SERVING")
        ready = protocol.METHODS["ServerReady"]
        assert not ready.response.FromString(caller.send(b"", path=ready.path)[0]).ready
        assert not any(line.startswith("model b_slow") for line in server.seen), "it loaded before it was asked"
        server.wait_for("^ready$")
        assert outputs(caller.send(request("b_slow", NONE))[0])
        assert (caller.health(), caller.health("b_slow"), caller.health("a_quick")) == ("SERVING",) * 3
        caller.close()


def test_a_signal_while_models_load_ends_it_well(tmp_path: Path) -> None:
    models.save(tmp_path, "slow", slow_start(), "max_batch_size = 64\n")
    with starting(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "model.onnx"), (b"nonsense" * 1000, "model.onnx"), (models.chain().SerializeToString()[:200], "model.onnx")],
    ids=["empty", "corrupt", "truncated"],
)
def test_a_file_that_is_no_network_is_not_served_and_others_are(tmp_path: Path, content: bytes, words: str) -> None:
    models.save(tmp_path, "good", models.chain())
    (models.save(tmp_path, "bad", models.chain()) / "model.onnx").write_bytes(content)
    with ServerProcess(tmp_path, "--max-batch-size", "64") as server:
        caller = Caller(server)
        assert outputs(caller.send(request("good", ROW))[0])
        refused = caller.refused(request("bad", ROW))
        assert refused.code == "FAILED_PRECONDITION" and words in refused.text
        assert [line for line in server.lines if line.startswith("model bad version 1: NOT served: ")]
        caller.close()


def test_a_file_that_was_tampered_with_is_not_served(tmp_path: Path, digits_repository: Path) -> None:
    shutil.copytree(digits_repository / "digits", tmp_path / "tampered")
    shutil.copytree(digits_repository / "digits", tmp_path / "digits")
    path = tmp_path / "tampered" / "1" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit of one weight
    path.write_bytes(data)
    with ServerProcess(tmp_path) as server:
        caller = Caller(server)
        refused = caller.refused(request("tampered", np.ones((1, 64), np.float32)))
        assert refused.code == "FAILED_PRECONDITION" and "was changed: sha256 is" in refused.text
        assert caller.infer("digits", np.ones((1, 64), np.float32))[0].shape == (1, 10)
        caller.close()


def test_with_nothing_to_serve_it_ends(tmp_path: Path) -> None:
    assert "is not a folder" in refused_start(str(tmp_path / "nowhere"), *PORTS)
    assert f"no models in {tmp_path}" in refused_start(str(tmp_path), *PORTS)
    (models.save(tmp_path, "bad", models.chain()) / "model.onnx").write_bytes(b"")
    done = subprocess.run([*COMMAND, str(tmp_path), *PORTS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "model bad version 1: NOT served" in done.stdout and "no model could be loaded" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grpc-port", "70000"], "--grpc-port"),
        (["--max-batch-size", "many"], "--max-batch-size"),
        (["--provider", "abacus"], "provider"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path: Path, arguments: list[str], words: str) -> None:
    models.save(tmp_path, "m", models.chain())
    assert words in refused_start(str(tmp_path), *arguments)


@transports
def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path, transport: str) -> None:
    models.save(tmp_path, "m", models.chain())
    with ServerProcess(tmp_path, "--transport", transport, "--max-batch-size", "64") as server:
        port = server.address.rpartition(":")[2]
        for other in ("direct", "grpcio"):
            said = refused_start(
                str(tmp_path),
                "--transport",
                other,
                "--grpc-port",
                port,
                "--http-port",
                "0",
                "--metrics-port",
                "0",
                "--max-batch-size",
                "64",
            )
            assert f"cannot listen on 127.0.0.1:{port}" in said
        metrics = server.metrics_url.rpartition(":")[2].partition("/")[0]
        said = refused_start(
            str(tmp_path), "--transport", transport, "--grpc-port", "0", "--http-port", "0", "--metrics-port", metrics
        )
        assert f"cannot listen on 127.0.0.1:{metrics}" in said
        caller = Caller(server)
        assert outputs(caller.send(request("m", ROW))[0])
        caller.close()


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
@transports
def test_it_listens_on_ipv6(tmp_path: Path, transport: str) -> None:
    models.save(tmp_path, "m", models.chain())
    with ServerProcess(tmp_path, "--transport", transport, "--host", "::1", "--max-batch-size", "64") as server:
        assert server.address.startswith("[::1]:")
        caller = Caller(server)
        assert outputs(caller.send(request("m", ROW))[0]) and caller.health() == "SERVING"
        assert caller.metric("forwardpass_rows_total") == 1
        caller.close()


@pytest.fixture
def holding(tmp_path: Path) -> Path:
    models.save(tmp_path, "hold", models.hold(), "instances = 1\nmax_batch_size = 64\n")
    return tmp_path


def held(caller: Caller, turns: float = TURNS) -> grpc.Future:
    call = caller.start(request("hold", np.full((1, 1), turns, np.float32)))
    until(lambda: caller.metric("forwardpass_in_flight_requests") == 1, "the long run")
    return call


@pytest.mark.parametrize(
    ("transport", "number", "inline"),
    [
        ("direct", signal.SIGTERM, "0"),
        ("grpcio", signal.SIGTERM, "0"),
        ("direct", signal.SIGINT, "0.01"),
        ("grpcio", signal.SIGINT, "0.01"),
    ],
)
def test_what_is_in_flight_is_answered_before_the_end(
    holding: Path, transport: str, number: signal.Signals, inline: str
) -> None:
    options = ["--transport", transport, "--inline-run-limit", inline, "--grace", "60"]
    with ServerProcess(holding, *options) as server:
        caller = Caller(server)
        calls = [held(caller)]
        if inline == "0":  # else whoever would receive them is running the first
            calls += [caller.start(request("hold", NONE)) for _ in range(5)]
            until(lambda: caller.metric("forwardpass_queue_requests") == 5, "a queue")
        server.send(number)
        assert all(outputs(call.result(60))[0].shape == (1, 1) for call in calls)
        assert server.wait() == 0
        assert server.lines[-1] == "stopped" and "draining: " in server.tail()
        caller.close()


@transports
@pytest.mark.parametrize("again", [False, True], ids=["grace is over", "second signal"])
def test_what_takes_longer_than_the_grace_is_unavailable(holding: Path, transport: str, again: bool) -> None:
    options = ["--transport", transport, "--inline-run-limit", "0", "--grace", "600" if again else "0.1"]
    with ServerProcess(holding, *options) as server:
        caller = Caller(server)
        first = held(caller, 1e15)
        until(lambda: caller.metric("forwardpass_running_requests") == 1, "its run")  # else others may share it
        calls = [first, *(caller.start(request("hold", NONE)) for _ in range(3))]
        until(lambda: caller.metric("forwardpass_queue_requests") == 3, "a queue")
        server.send(signal.SIGTERM)
        if again:
            until(lambda: "draining: 4 requests in flight" in server.tail(), "the drain")
            server.send(signal.SIGTERM)
        codes = [call.code().name for call in calls]
        assert codes[1:] == ["UNAVAILABLE"] * 3
        assert codes[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")  # its run was ended
        assert server.wait() == 0, server.tail()
        caller.close()


@transports
@pytest.mark.parametrize("inline", ["0", "0.01"], ids=["by a thread", "where it was received"])
def test_a_run_without_an_end_is_ended_by_the_watchdog(holding: Path, transport: str, inline: str) -> None:
    options = ["--transport", transport, "--run-timeout", "0.5", "--inline-run-limit", inline]
    with ServerProcess(holding, *options) as server:
        caller = Caller(server)
        refused = caller.refused(request("hold", np.full((1, 1), 1e15, np.float32)), timeout=60)
        assert refused.code == "DEADLINE_EXCEEDED" and "longer than the server allows" in refused.text
        assert caller.infer("hold", NONE)[0].tolist() == [[0.0]]
        until(caller.idle)
        assert caller.metric("forwardpass_refused_total", reason="run_timeout") == 1
        caller.close()


def test_it_is_light_and_knows_nothing_of_torch(digits_repository: Path) -> None:
    with ServerProcess(digits_repository) as server:
        caller = Caller(server)
        for _ in range(50):
            caller.infer("digits", np.ones((8, 64), np.float32))
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "onnxruntime" in maps and "torch" not in maps
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())[1])  # type: ignore[index]
        assert resident < 200 * 1024
        caller.close()


def test_start_up_says_what_was_loaded_where_and_why(digits_repository: Path) -> None:
    with ServerProcess(digits_repository) as server:
        place = server.lines.index("ready")
        before, after = server.lines[:place], server.lines[place + 1 :]
        (line,) = [line for line in before if line.startswith("model digits")]
        for words in (
            "version 1: batches of up to",
            "exact",
            "contract of",
            "holds",
            "cpu, 1 instance",
            "thread",
            "loaded in",
        ):
            assert words in line
        assert [line.split()[0] for line in before if line.startswith(("grpc ", "metrics "))] == ["grpc", "metrics"]
        # A watch may log something by then; of what was loaded, and where, nothing comes after "ready".
        assert not [line for line in after if line.startswith(("model ", "grpc ", "metrics ", "ready"))]


def test_a_refused_call_does_not_raise_on_the_servers_side(holding: Path) -> None:
    with ServerProcess(holding) as server:
        caller = Caller(server)
        with pytest.raises(Refused):
            caller.send(request("hold", np.ones((1, 2), np.float32)))
        caller.close()
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line or "ERROR" in line]
