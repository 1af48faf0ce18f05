"""The log of a real server: JSON line by line whatever goes wrong, an access log, and no secret in either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, request, until
from raw_client import HELLO, RawClient
from test_lost_port import path_that_is_no_text

from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")
JSON = ("--log-format", "json")
TOKEN, WRONG, CONTENT = "sentinel-of-a-token", "sentinel-of-a-wrong-token", "sentinel-of-a-tensor"


def parsed(server: ServerProcess) -> list[dict[str, Any]]:
    """Every line that the server wrote, each of which must be an object with the fields that all have."""
    found = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in found)
    return found


def accesses(server: ServerProcess) -> list[dict[str, Any]]:
    return [line for line in parsed(server) if line["logger"] == "forwardpass.access"]


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_every_line_parses_and_no_secret_is_in_any(tmp_path: Path, serve: Serve, transport: str) -> None:
    models.save(tmp_path / "models", "words", models.echo(models.STRING, ("batch", 1)))
    models.save(tmp_path / "models", "table", models.table(8))
    (models.save(tmp_path / "models", "bad", models.chain()) / "model.onnx").write_bytes(b"no network")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"infer {TOKEN}\n")
    options = ("--transport", transport, "--tokens", str(tokens), "--log-level", "debug", "--access-log", "1")
    server = serve(tmp_path / "models", *JSON, *options)
    caller = Caller(server)
    allowed, refused = (("authorization", f"Bearer {TOKEN}"), TRACEPARENT), (("authorization", f"Bearer {WRONG}"),)
    words = np.array([[CONTENT]], object)
    assert caller.send(request("words", words, id="a word"), metadata=allowed)
    assert caller.refused(request("words", words), metadata=refused).code == "UNAUTHENTICATED"
    assert caller.refused(request("table", np.array([[99]], np.int64), id="wrong"), metadata=allowed).code
    assert caller.refused(request("nobody", words), metadata=allowed).code == "NOT_FOUND"
    assert caller.refused(CONTENT.encode() * 3, metadata=allowed).code == "INVALID_ARGUMENT"
    until(lambda: len(accesses(server)) >= 5, "the access log")
    by_id = {line.get("request_id", ""): line for line in accesses(server)}
    good, wrong = by_id["a word"], by_id["wrong"]
    assert (good["model"], good["version"], good["rows"], good["status"]) == ("words", "1", 1, "OK")
    assert good["trace_id"] == wrong["trace_id"] == TRACE
    assert 0 <= good["queue_ms"] <= good["total_ms"] and 0 <= good["run_ms"] <= good["total_ms"]
    assert ("peer" in good) == (transport == "direct")
    assert (wrong["status"], wrong["reason"]) == ("INVALID_ARGUMENT", "invalid")
    reasons = {line.get("reason") for line in accesses(server)}
    assert {None, "unauthenticated", "unknown_model", "invalid"} <= reasons
    assert server.stop() == 0
    caller.close()
    found = parsed(server)
    assert [line for line in found if line["message"] == "ready"] and found[-1]["message"] == "stopped"
    text = "\n".join(server.lines)
    for secret in (TOKEN, WRONG, CONTENT):
        assert secret not in text and secret.encode().hex() not in text


def test_a_server_that_fails_leaves_json(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    server = serve(tmp_path / "models", *JSON, "--transport", "grpcio", "--flight-folder", str(tmp_path))
    client = RawClient(server.address)
    client.send(HELLO, path_that_is_no_text(1))
    assert server.wait() == 1
    client.close()
    found = parsed(server)
    assert any("the server exits, so that it can be restarted" in line["message"] for line in found)
    assert any("\n" in line["traceback"] for line in found if "traceback" in line)


def test_a_server_that_cannot_start_says_so_in_json(tmp_path: Path, serve: Serve) -> None:
    with pytest.raises(Exception, match=r'"level": "critical".*is not a folder'):
        serve(tmp_path / "nowhere", *JSON)


def test_a_sample_is_a_sample_and_none_is_none(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    x = np.ones((1, 4), np.float32)
    for rate, low, high in (("0.2", 20, 110), ("0", 0, 0)):
        server = serve(tmp_path / "models", *JSON, "--access-log", rate)
        caller = Caller(server)
        for answer in caller.all([request("chain", x) for _ in range(300)]):
            assert isinstance(answer, bytes)
        assert caller.refused(request("nobody", x)).code == "NOT_FOUND"
        assert server.stop() == 0
        caller.close()
        lines = accesses(server)
        assert low <= len([line for line in lines if line["status"] == "OK"]) <= high
        assert len([line for line in lines if line["status"] == "NOT_FOUND"]) == (rate != "0")


def test_the_console_has_lines_for_people(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path / "models", "chain", models.chain())
    server = serve(tmp_path / "models", "--access-log", "1", "--log-level", "error")
    caller = Caller(server)
    caller.send(request("chain", np.ones((1, 4), np.float32), id="seen"), metadata=(TRACEPARENT,))
    until(lambda: f"trace_id={TRACE}" in server.tail(), "the line")
    (line,) = [line for line in server.lines if "forwardpass.access" in line]
    assert "INFO forwardpass.access: request request_id=seen model=chain version=1 rows=1 status=OK queue_ms=" in line
    caller.close()
