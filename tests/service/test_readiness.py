"""What ready means where some models fail, and what the index, the metrics and the port for them say of those."""

from __future__ import annotations

import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, outputs, request, until
from test_lifecycle import starting

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

ROW = np.ones((1, 4), np.float32)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One good model, three that fail, and folders that cannot be models or versions."""
    root = tmp_path / "models"
    models.save(root, "good", models.chain())
    (models.save(root, "corrupt", models.chain()) / "model.onnx").write_bytes(b"no network")
    models.save(root, "misnamed", models.chain())
    (root / "misnamed" / "1" / "model.onnx").rename(root / "misnamed" / "1" / "best.onnx")
    models.save(root, "optioned", models.chain(), "max_batch_sise = 4\n")
    (root / "notes").mkdir()
    for version in ("007", "v2", "3"):
        (root / "good" / version).mkdir()
    return root


def index(caller: Caller) -> dict[tuple[str, str], tuple[str, str]]:
    method = protocol.METHODS["RepositoryIndex"]
    answer = method.response.FromString(caller.send(b"", path=method.path)[0])
    return {(m.name, m.version): (m.state, m.reason) for m in answer.models}


def server_ready(caller: Caller) -> bool:
    method = protocol.METHODS["ServerReady"]
    return bool(method.response.FromString(caller.send(b"", path=method.path)[0]).ready)


def states(caller: Caller) -> set[tuple[str, str, str]]:
    return {
        (model, version, state)
        for model, version, _, _ in [(*key, *value) for key, value in index(caller).items()]
        for state in ("ready", "failed", "stale", "skipped", "loading", "not_loaded")
        if caller.metric("forwardpass_model_state", model=model, version=version, state=state)
    }


def test_what_failed_and_what_is_skipped_is_named(mixed: Path, serve: Serve) -> None:
    server = serve(mixed)
    caller = Caller(server)
    assert server_ready(caller) and caller.health() == "SERVING"  # without --strict
    found = index(caller)
    assert {key: state for key, (state, _) in found.items()} == {
        ("good", "1"): "READY",
        **dict.fromkeys(
            [("good", "007"), ("good", "v2"), ("good", "3"), ("notes", ""), ("misnamed", ""), ("misnamed", "1"),
             ("corrupt", "1"), ("optioned", "1")], "UNAVAILABLE",
        ),
    }  # fmt: skip
    assert all(reason for key, (_, reason) in found.items() if key != ("good", "1"))
    assert "1: expected model.onnx in it, it has best.onnx" in found["misnamed", ""][1]
    assert states(caller) == {
        ("good", "1", "ready"), ("good", "007", "skipped"), ("good", "v2", "skipped"), ("good", "3", "skipped"),
        ("notes", "", "skipped"), ("misnamed", "1", "skipped"), ("misnamed", "", "failed"),
        ("corrupt", "1", "failed"), ("optioned", "1", "failed"),
    }  # fmt: skip
    for name in ("corrupt", "misnamed", "optioned"):
        assert caller.metric("forwardpass_model_load_failures_total", model=name) == 1
        assert [line for line in server.lines if line.startswith(f"model {name} ") and "NOT served" in line]
    for folder in ("good/007", "good/v2", "good/3", "notes", "misnamed/1"):
        assert [line for line in server.lines if f"{folder} is skipped: " in line], folder
    refused = caller.refused(request("good", ROW, model_version="007"))
    assert refused.code == "NOT_FOUND" and "is skipped: expected a folder named by a whole number" in refused.text
    caller.close()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_strict_is_ready_once_every_model_serves(mixed: Path, transport: str) -> None:
    options = ["--strict", "--model-control", "poll", "--poll-seconds", "0.1", "--transport", transport]
    with starting(mixed, *options) as server:
        said = server.wait_for("^NOT ready, with --strict, until every model serves: ")
        assert said.string.endswith(": corrupt 1, misnamed, optioned 1 do not")
        caller = Caller(Server(server))  # type: ignore[arg-type]
        assert not server_ready(caller) and caller.health() == "NOT_SERVING"
        assert caller.metric("forwardpass_ready") == 0
        # The good one is there for whoever asks for it.
        assert outputs(caller.send(request("good", ROW))[0]) and caller.health("good") == "SERVING"
        assert caller.health("corrupt") == "NOT_SERVING"
        for name in ("corrupt", "misnamed", "optioned"):
            shutil.rmtree(mixed / name)
        models.save(mixed, "corrupt", models.chain())
        server.wait_for("^ready$")
        assert server_ready(caller) and caller.health() == "SERVING" and caller.metric("forwardpass_ready") == 1
        # A model that fails later is seen, and takes no replica out.
        (models.save(mixed, "late", models.chain()) / "model.onnx").write_bytes(b"no network")
        until(lambda: ("late", "1", "failed") in states(caller), "the failure")
        assert server_ready(caller) and caller.health() == "SERVING"
        caller.close()


class Server:
    """What a Caller needs of a server that is not ready."""

    def __init__(self, starting: Any) -> None:
        self.address, self._url = starting.address, starting.metrics_url

    def metrics(self) -> str:
        return fetch(self._url)


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as response:
        text: str = response.read().decode()
    return text


def test_the_metrics_port_has_metrics_alone(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "hold", models.hold(), "instances = 1\nmax_batch_size = 64\n")
    server = serve(tmp_path, "--drain-wait", "600", "--inline-run-limit", "0")
    base = server.metrics_url.removesuffix("/metrics")
    for draining in (False, True):
        if draining:
            server.send(signal.SIGTERM)
            until(lambda: "draining: not ready" in server.tail(), "the drain")
        for path in ("/", "/ready", "/health", "/healthz", "/metrics/x", "/favicon.ico"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                fetch(base + path)
            assert caught.value.code == 404
            caught.value.close()
        for path in ("/metrics", "/metrics?name[]=forwardpass_ready"):
            assert f"forwardpass_ready {0.0 if draining else 1.0}" in fetch(base + path)
    server.send(signal.SIGTERM)
    assert server.wait() == 0
