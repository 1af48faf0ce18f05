"""`buf curl` with nothing but the address: it learns the messages by reflection."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from tests.conformance.tool import Tool

from forwardpass import Client, protocol
from forwardpass.testing.server_process import ServerProcess


def curl(buf: Tool, server: ServerProcess, method: str, message: dict[str, Any]) -> dict[str, Any]:
    url = f"http://{server.address}/{method}"
    said = buf.run("curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(message), url)
    found: dict[str, Any] = json.loads(said)
    return found


def test_every_method_is_listed(buf: Tool, served: ServerProcess) -> None:
    said = buf.run(
        "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-methods", f"http://{served.address}"
    )
    assert {f"{m.service}/{m.name}" for m in (*protocol.METHODS.values(), *protocol.HEALTH_METHODS.values())} <= set(
        said.split()
    )


def test_it_asks_and_infers(buf: Tool, served: ServerProcess) -> None:
    service = protocol.INFERENCE_SERVICE
    assert curl(buf, served, f"{protocol.HEALTH_SERVICE}/Check", {"service": "digits"}) == {"status": "SERVING"}
    told = curl(buf, served, f"{service}/ModelMetadata", {"name": "digits"})
    assert [t["datatype"] for t in told["inputs"]] == ["FP32"]
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
    name = told["inputs"][0]["name"]
    request = {
        "modelName": "digits",
        "inputs": [{"name": name, "datatype": "FP32", "shape": [2, 64]}],
        "rawInputContents": [base64.b64encode(x.tobytes()).decode()],
    }
    answer = curl(buf, served, f"{service}/ModelInfer", request)
    found = np.frombuffer(base64.b64decode(answer["rawOutputContents"][0]), "<f4").reshape(2, 10)
    with Client(served.address) as client:
        assert np.array_equal(found, client.predict("digits", x))


def test_an_error_is_one_for_buf_too(buf: Tool, served: ServerProcess) -> None:
    url = f"http://{served.address}/{protocol.INFERENCE_SERVICE}/ModelMetadata"
    said = buf.run(
        "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", '{"name": "nobody"}', url, check=False
    )
    assert "not_found" in said and "there is no model 'nobody'" in said
