"""SIGHUP reads again what can be read again, SIGUSR1 shows what the server has; neither ends it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from caller import Caller, outputs, request, until
from test_lifecycle import COMMAND, PORTS, Starting, starting

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

ROW = np.ones((1, 4), np.float32)


def told(server: ServerProcess, signal_number: signal.Signals, line: str, times: int = 1) -> None:
    """Send a signal and wait for what comes of it."""
    server.send(signal_number)
    until(lambda: sum(line in said for said in list(server.lines)) >= times, f"{line!r}")


@pytest.mark.parametrize("mode", ["none", "poll", "explicit"])
def test_hup_brings_the_repository_in_line(tmp_path: Path, serve: Serve, mode: str) -> None:
    models.save(tmp_path, "m", models.chain())
    models.save(tmp_path, "gone", models.chain())
    more = ["--load-model", "*"] if mode == "explicit" else []
    server = serve(tmp_path, "--model-control", mode, "--poll-seconds", "3600", *more)
    caller = Caller(server)
    before = outputs(caller.send(request("m", ROW))[0])[0].tobytes()
    models.save(tmp_path, "m", models.chain(seed=7), version=2)
    models.save(tmp_path, "new", models.chain())
    (tmp_path / "gone").rename(tmp_path / ".gone")
    loaded, served = (1, 2) if mode == "explicit" else (2, 2)
    told(server, signal.SIGHUP, f"SIGHUP: repository: {loaded} version(s) loaded, {served} served, 0 not served")
    assert outputs(caller.send(request("m", ROW))[0])[0].tobytes() != before
    if mode == "explicit":  # what nobody asked for is not loaded, and nothing is unloaded
        assert caller.refused(request("new", ROW)).code == "NOT_FOUND"
        assert outputs(caller.send(request("gone", ROW))[0])
    else:
        assert outputs(caller.send(request("new", ROW))[0])
        assert caller.refused(request("gone", ROW)).code == "NOT_FOUND"
    assert caller.health() == "SERVING"
    assert server.stop() == 0
    caller.close()


def test_hup_reads_tokens_and_says_what_came_of_it(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "m", models.chain())
    tokens = tmp_path / "tokens"
    tokens.write_text("infer first-first-first\n")
    status = tokens.stat()
    server = serve(tmp_path / "models", "--tokens", str(tokens))
    caller = Caller(server)

    def works(token: str) -> bool:
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            return bool(outputs(caller.send(request("m", ROW), metadata=metadata)[0]))
        except Exception:
            return False

    assert works("first-first-first")
    tokens.write_text("infer other-other-other\n")
    os.utime(tokens, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing but the content differs
    told(server, signal.SIGHUP, "SIGHUP: tokens: in use")
    assert works("other-other-other") and not works("first-first-first")
    tokens.write_text("nonsense\n")
    told(server, signal.SIGHUP, "SIGHUP: tokens: NOT in use, the last good ones stay: tokens: ")
    assert works("other-other-other")
    until(lambda: "SIGHUP: repository: 0 version(s) loaded, 1 served" in server.tail(), "the repository")
    caller.close()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_usr1_shows_the_state_and_serving_goes_on(tmp_path: Path, serve: Serve, transport: str) -> None:
    models.save(tmp_path, "hold", models.hold(), "instances = 1\nmax_batch_size = 64\n")
    (models.save(tmp_path, "bad", models.chain()) / "model.onnx").write_bytes(b"no network")
    (tmp_path / "notes").mkdir()
    server = serve(tmp_path, "--transport", transport, "--inline-run-limit", "0")
    caller = Caller(server)
    call = caller.start(request("hold", np.full((1, 1), 1e15, np.float32)))
    until(lambda: caller.metric("forwardpass_running_requests") == 1, "the run")
    waiting = caller.start(request("hold", np.zeros((1, 1), np.float32)))
    until(lambda: caller.metric("forwardpass_queue_requests") == 1, "the queue")
    told(server, signal.SIGUSR1, "state: forwardpass_ready{} 1")  # the last line
    text = "\n".join(server.lines)
    for words in (
        "Current thread 0x", "in run_forever", "state: model hold version 1 is ready",
        "state: model bad version 1 is failed: ", "state: folder notes/ is skipped: ",
        "state: forwardpass_running_requests{model=hold,version=1} 1", "state: forwardpass_in_flight_requests{} 2",
    ):  # fmt: skip
        assert words in text, words
    assert caller.health() == "SERVING"
    call.cancel()
    waiting.cancel()
    caller.close()


def test_signals_while_models_load_do_not_end_it(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain(), 'labels = "labels.txt"\n')
    os.mkfifo(tmp_path / "m" / "labels.txt")
    with starting(tmp_path) as server:
        writer = os.open(tmp_path / "m" / "labels.txt", os.O_WRONLY)  # it loads
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for("state: model m version 1 is loading")
        server.process.send_signal(signal.SIGHUP)
        os.write(writer, b"a\nb\nc\n")
        (tmp_path / "m" / "labels.txt").unlink()
        (tmp_path / "m" / "labels.txt").write_text("a\nb\nc\n")
        os.close(writer)
        for _ in range(2):  # whichever comes first
            server.wait_for("^ready$|^SIGHUP: repository: . version.s. loaded, 1 served, 0 not served")


def test_a_terminal_that_is_closed_ends_it_with_a_drain(tmp_path: Path) -> None:
    """A shell sends SIGHUP to what it started when its terminal goes: nobody would end the server after that."""
    models.save(tmp_path, "m", models.chain())
    terminal, its_input = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path), *PORTS], stdin=its_input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        os.close(its_input)
        server = Starting(process)
        server.wait_for("^ready$")
        process.send_signal(signal.SIGHUP)
        server.wait_for("^SIGHUP: repository: ")
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        server.wait_for("^stopped$")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
