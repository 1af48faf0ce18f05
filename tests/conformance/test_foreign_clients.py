"""Clients that come with other projects, each run by the tools' own Python as its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.conformance.tool import Tool

from forwardpass import Client, protocol
from forwardpass.testing.server_process import ServerProcess

HERE = Path(__file__).parent
X = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)


def said(python: Tool, script: str, address: str) -> Any:
    # What a client logs stands before its last line.
    return json.loads(python.run(HERE / script, address).strip().splitlines()[-1])


def expected(server: ServerProcess) -> list[list[float]]:
    with Client(server.address) as client:
        found: list[list[float]] = client.predict("digits", X).tolist()
    return found


def test_kserves_grpc_client(python: Tool, served: ServerProcess) -> None:
    found = said(python, "kserve_client.py", served.address)
    assert found["live"] is found["ready"] is found["model_ready"] is True
    assert found["nobody"] == "StatusCode.NOT_FOUND"
    assert (found["id"], found["version"]) == ("mine", "1")
    assert found["raw"] == found["typed"] == found["wanted_typed"] == expected(served)


def test_kserves_rest_client(python: Tool, served: ServerProcess) -> None:
    found = said(python, "kserve_rest_client.py", served.http_url)
    assert found["live"] == found["model_ready"] == [True, True] and found["ready"] is True
    assert "there is no model 'nobody'" in found["nobody"][0] and found["nobody"][1] is False
    assert "explanations are not offered" in found["explain"] and "501" in found["explain"]
    assert found["id"] == "mine"
    assert found["raw"] == found["typed"] == found["predicted"] == expected(served)


def test_tritonclients_own_shared_memory(python: Tool, served: ServerProcess) -> None:
    assert said(python, "triton_shared_memory.py", served.address) == expected(served)


def test_an_old_c_core_that_cancels_keeps_its_connection(old_grpc: Tool, served: ServerProcess, tmp_path: Path) -> None:
    """It resets calls that it never began; those beside them on the connection are answered all the same."""
    message = protocol.ModelInferRequest(model_name="digits", raw_input_contents=[X.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=X.shape)
    (tmp_path / "message").write_bytes(message.SerializeToString())
    path = protocol.METHODS["ModelInfer"].path
    words = old_grpc.run(HERE / "old_grpc_cancels.py", served.address, path, tmp_path / "message")
    found = json.loads(words.strip().splitlines()[-1])
    assert found["grpcio"].startswith("1.62.") and found["ended"] == {"answered": found["asked"]}, found
