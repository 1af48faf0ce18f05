"""KServe's resources fit its schemas, and the server really does what the runtime's command line says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.deploy import toolbox

from forwardpass.testing.server_process import ServerProcess

KSERVE = toolbox.DEPLOY / "kserve"
NOT_HERE = ("--host", "--grpc-port", "--http-port", "--metrics-port")  # a free port of this machine's own instead


def _load(name: str) -> dict[str, Any]:
    found = toolbox.validate((KSERVE / name).read_text(encoding="utf-8"), toolbox.versions()[-1:])
    assert not found.problems, "\n".join(found.problems)
    return found.objects[0]


def test_the_service_names_the_runtime_and_its_protocol() -> None:
    runtime, service = _load("runtime.yaml"), _load("inferenceservice.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in [f["name"] for f in runtime["spec"]["supportedModelFormats"]]


@pytest.mark.parametrize(
    ("name", "protocols", "kind", "option"),
    [
        ("runtime.yaml", ["grpc-v2"], "h2c", "--grpc-port"),
        ("runtime-http.yaml", ["v1", "v2"], "http1", "--http-port"),
    ],
)
def test_the_container_is_as_kserve_wants_it(name: str, protocols: list[str], kind: str, option: str) -> None:
    runtime = _load(name)["spec"]
    assert runtime["protocolVersions"] == protocols
    (container,) = runtime["containers"]
    assert container["name"] == "kserve-container"
    (port,) = container["ports"]
    assert port["name"] == kind and f"{option}={port['containerPort']}" in container["args"]
    assert f"--grpc-port={container['readinessProbe']['grpc']['port']}" in container["args"]
    assert container["securityContext"]["runAsUser"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_a_field_that_there_is_not_is_noticed() -> None:
    text = (KSERVE / "runtime.yaml").read_text(encoding="utf-8").replace("protocolVersions:", "protocolVersion:")
    assert [p for p in toolbox.validate(text, toolbox.versions()[-1:]).problems if "protocolVersion" in p]


@pytest.mark.parametrize("name", ["runtime.yaml", "runtime-http.yaml"])
def test_the_command_line_serves_a_mounted_model(digits_repository: Path, tmp_path: Path, name: str) -> None:
    """With the model mounted as KServe's storage initializer leaves it: its files directly in the folder."""
    mounted = tmp_path / "models"
    shutil.copytree(digits_repository / "digits" / "1", mounted)
    command, folder, *options = _load(name)["spec"]["containers"][0]["args"]
    assert (command, folder) == ("serve", "/mnt/models")
    options = [o.replace("{{.Name}}", "my-digits") for o in options if not o.startswith(NOT_HERE)]
    assert "--model-name=my-digits" in options
    with ServerProcess(mounted, *options, "--drain-wait=0") as server:
        client = triton.InferenceServerClient(server.address)
        assert client.is_model_ready("my-digits")
        given = triton.InferInput("x", [1, 64], "FP32")
        given.set_data_from_numpy(np.zeros((1, 64), np.float32))
        assert client.infer("my-digits", [given]).as_numpy("logits").shape == (1, 10)
        client.close()
        row = json.dumps({"instances": [[0.0] * 64]}).encode()
        with urlopen(f"{server.http_url}/v1/models/my-digits:predict", row) as response:
            assert len(json.load(response)["predictions"][0]) == 10


@pytest.mark.parametrize("name", ["runtime.yaml", "runtime-http.yaml", "inferenceservice.yaml"])
def test_each_file_is_one_object(name: str) -> None:
    assert _load(name)["apiVersion"].startswith("serving.kserve.io/")
