"""The HTTP port in front of a real server: every path, and answers that are those of gRPC, bit for bit."""

from __future__ import annotations

import base64
import gzip
import json
import re
import ssl
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, outputs, request
from certificates import Authority
from http_caller import HttpCaller, binary, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forwardpass.testing.server_process import ServerProcess

ROWS = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), "max_batch_size = 64\n")
    models.save(root, "two", models.two_by_two(), "max_batch_size = 64\n")
    models.save(root, "text", models.echo(models.STRING), "max_batch_size = 64\n")
    for name, element in models.ELEMENTS.items():
        models.save(root, f"echo_{name}", models.echo(element, ("batch", "width")), "max_batch_size = 64\n")
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[ServerProcess]:
    options = ["--transport", request.param, "--model-control", "explicit", "--load-model", "*"]
    with ServerProcess(repository, *options) as running:
        yield running
        assert running.stop() == 0, running.tail()
        assert not [line for line in running.lines if "Traceback" in line], running.tail()


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[HttpCaller]:
    caller = HttpCaller(server.http_url)
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def grpc(server: ServerProcess) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


def test_answers_are_those_of_grpc(http: HttpCaller, grpc: Caller) -> None:
    expected = grpc.infer("chain", ROWS)[0]
    answer = http.infer("chain", {"id": "7", "inputs": [tensor(ROWS)]})
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert (answer.json["id"], answer.json["model_name"], answer.json["model_version"]) == ("7", "chain", "1")
    (output,) = answer.json["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", [3, 3])
    assert np.array(output["data"], np.float32).tobytes() == expected.tobytes()

    body, length = binary({"x": ROWS})
    answer = http.post("/v2/models/chain/versions/1/infer", body, inference_header_content_length=str(length))
    assert answer.status == 200 and answer.headers["content-type"] == "application/octet-stream"
    start = int(answer.headers["inference-header-content-length"])
    assert answer.body[start:] == expected.tobytes()
    assert json.loads(answer.body[:start])["outputs"][0]["parameters"] == {"binary_data_size": expected.nbytes}

    raw = http.infer("chain", ROWS.tobytes(), inference_header_content_length="0")
    assert raw.body[int(raw.headers["inference-header-content-length"]) :] == expected.tobytes()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_datatype_comes_back_as_it_was(http: HttpCaller, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["FP32", "FP64", "INT64", "UINT64", "INT8", "UINT16", "BOOL", "BYTES"]))
    elements: dict[str, Any] = {
        "FP32": st.floats(width=32, allow_nan=False), "FP64": st.floats(allow_nan=False),
        "INT64": st.integers(-(2**63), 2**63 - 1), "UINT64": st.integers(0, 2**64 - 1),
        "INT8": st.integers(-128, 127), "UINT16": st.integers(0, 65535), "BOOL": st.booleans(), "BYTES": st.text(),
    }  # fmt: skip
    values = data.draw(st.lists(elements[name], min_size=1, max_size=6))
    given = {"name": "x", "shape": [1, len(values)], "datatype": name, "data": [values]}
    answer = http.infer(f"echo_{name}", {"inputs": [given]})
    assert answer.status == 200, answer
    found = answer.json["outputs"][0]["data"]
    # A float32 has the fewest digits that give it back, as a float32.
    assert found == values if name != "FP32" else np.float32(found).tobytes() == np.float32(values).tobytes()


@pytest.mark.parametrize("name", ["FP16", "BF16", "INT16", "UINT8", "UINT32", "INT32"])
def test_the_other_datatypes(http: HttpCaller, name: str) -> None:
    answer = http.infer(f"echo_{name}", {"inputs": [tensor(np.array([[1, 2, 0]]), name)]})
    assert answer.json["outputs"][0]["data"] == [1, 2, 0]


def test_inputs_and_outputs_may_be_mixed(http: HttpCaller, grpc: Caller) -> None:
    a, n = ROWS[:, :3], np.array([[1], [2], [3]], np.int64)
    expected = outputs(grpc.send(request("two", np.ascontiguousarray(a), n, names=("a", "n")))[0])
    body, length = binary({"a": a}, outputs=[{"name": "most", "parameters": {"binary_data": True}}, {"name": "n_out"}])
    head = json.loads(body[:length])
    del head["parameters"]
    head["inputs"].insert(0, tensor(n, "INT64", "n"))
    text = json.dumps(head).encode()
    answer = http.infer("two", text + body[length:], inference_header_content_length=str(len(text)))
    start = int(answer.headers["inference-header-content-length"])
    most, n_out = json.loads(answer.body[:start])["outputs"]
    assert n_out["data"] == [1, 2, 3] and most["parameters"] == {"binary_data_size": 12}
    assert answer.body[start:] == expected[1].tobytes()


def test_classes_with_their_index(http: HttpCaller) -> None:
    wanted = [{"name": "y", "parameters": {"classification": 2}}]
    answer = http.infer("chain", {"inputs": [tensor(ROWS[:1])], "outputs": wanted})
    (output,) = answer.json["outputs"]
    assert output["datatype"] == "BYTES" and all(re.fullmatch(r"-?\d+\.\d+:\d", text) for text in output["data"])


def test_predict_as_tensorflow_serving_has_it(http: HttpCaller, grpc: Caller) -> None:
    expected = grpc.infer("chain", ROWS)[0]
    for path in ("/v1/models/chain:predict", "/v1/models/chain/versions/1:predict"):
        answer = http.post(path, {"instances": ROWS.tolist()})
        assert np.array(answer.json["predictions"], np.float32).tobytes() == expected.tobytes()
    answer = http.post("/v1/models/chain:predict", {"inputs": {"x": ROWS.tolist()}})
    assert np.array(answer.json["outputs"], np.float32).tobytes() == expected.tobytes()
    rows = [{"a": [1, 2, 3], "n": [4]}, {"a": [0, 0, 9], "n": [1]}]
    answer = http.post("/v1/models/two:predict", {"instances": rows})
    assert answer.json["predictions"] == [
        {"sum": [5, 6, 7], "most": 3, "n_out": [4]},
        {"sum": [1, 1, 10], "most": 9, "n_out": [1]},
    ]
    assert http.post("/v1/models/text:predict", {"instances": [["a", "é"]]}).json["predictions"] == [["a", "é"]]
    assert http.get("/v1/models").json["models"][0] == "chain"
    assert http.get("/").json == {"status": "alive"}
    refused = http.post("/v1/models/chain:explain", {"instances": ROWS.tolist()})
    assert refused.status == 501 and "explanations are not offered" in refused.error
    assert http.get("/v1/models/chain").json["model_version_status"][0]["state"] == "AVAILABLE"
    for wrong, text in (
        ({}, "either 'instances'"),
        ({"instances": []}, "at least one row"),
        ({"instances": [[1, 2, 3, 4], {"x": 1}]}, "expected rows that are objects"),
        ({"inputs": {"z": 1}}, "missing input 'x'"),
        ({"inputs": {"x": [[1, 2, 3, 4]], "z": 1}}, "unexpected input 'z'"),
        ({"instances": [[1, 2, 3, 4], [1]]}, "expected data nested as shape"),
    ):
        answer = http.post("/v1/models/chain:predict", wrong)
        assert answer.status == 400 and text in answer.error


def test_what_the_server_says_of_itself(http: HttpCaller) -> None:
    assert http.get("/v2/health/live").json == {"live": True}
    assert http.get("/v2/health/ready").json == {"ready": True}
    assert http.get("/v2").json["name"] == "forwardpass"
    metadata = http.get("/v2/models/chain").json
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "parameters": {}}]
    assert http.get("/v2/models/chain/versions/1").json == metadata
    assert http.get("/v2/models/chain/ready").json == {"name": "chain", "ready": True}
    config = http.get("/v2/models/chain/config").json
    assert config["max_batch_size"] == 64 and config["input"][0]["dims"] == [4]
    http.infer("chain", {"inputs": [tensor(ROWS)]})
    stats = http.get("/v2/models/chain/versions/1/stats").json["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] > 0 and isinstance(
        stats["inference_stats"]["success"]["ns"], int
    )
    assert {s["name"] for s in http.get("/v2/models/stats").json["model_stats"]} >= {"chain", "two"}
    head = http.ask("HEAD", "/v2/health/live")
    assert head.status == 200 and not head.body


def test_models_come_and_go(http: HttpCaller) -> None:
    assert http.post("/v2/repository/models/chain/unload").status == 200
    assert http.get("/v2/models/chain/ready").status == 503
    index = http.post("/v2/repository/index").json
    assert [m["state"] for m in index if m["name"] == "chain"] == ["UNAVAILABLE"]
    assert "chain" not in {m["name"] for m in http.post("/v2/repository/index", {"ready": True}).json}
    data = base64.b64encode(models.chain(seed=1).SerializeToString()).decode()
    config = json.dumps({"name": "chain", "max_batch_size": 8})
    given = {"parameters": {"config": config, "file:1/model.onnx": data}}
    assert http.post("/v2/repository/models/chain/load", given).status == 200
    assert http.get("/v2/models/chain/config").json["max_batch_size"] == 8
    assert http.post("/v2/repository/models/chain/load").status == 200
    assert http.get("/v2/models/chain/config").json["max_batch_size"] == 64


def test_settings(http: HttpCaller) -> None:
    before = http.get("/v2/logging").json
    assert http.post("/v2/logging", {"log_verbose_level": 1}).json["log_verbose_level"] == 1
    assert http.post("/v2/logging", {"log_verbose_level": 0}).json == before
    assert http.get("/v2/trace/setting").json["trace_level"] == ["OFF"]
    assert http.get("/v2/models/chain/trace/setting").json["trace_level"] == ["OFF"]
    assert http.post("/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}).status == 501


def test_compressed_both_ways(http: HttpCaller) -> None:
    body = json.dumps({"inputs": [tensor(np.zeros((64, 4), np.float32))]}).encode()
    plain = http.infer("chain", body)
    for encoding, deflated, inflate in (
        ("gzip", gzip.compress(body), gzip.decompress),
        ("deflate", zlib.compress(body), zlib.decompress),
        ("deflate", zlib.compress(body)[2:-4], zlib.decompress),
    ):
        answer = http.infer("chain", deflated, content_encoding=encoding, accept_encoding=f"br, {encoding};q=0.5")
        assert answer.headers["content-encoding"] == encoding and inflate(answer.body) == plain.body
    assert "content-encoding" not in http.infer("chain", body, accept_encoding="gzip;q=0, br").headers
    refused = http.infer("chain", body, content_encoding="br")
    assert refused.status == 415 and "expected gzip, deflate or identity, got 'br'" in refused.error
    for broken in (b"not gzip", gzip.compress(body)[:-9], gzip.compress(body) + b"more"):
        assert http.infer("chain", broken, content_encoding="gzip").status == 400


def test_timings_come_as_headers(http: HttpCaller) -> None:
    answer = http.infer("chain", {"inputs": [tensor(ROWS)]}, forwardpass_timings="1")
    assert int(answer.headers["forwardpass-total-us"]) >= 0 and answer.headers["forwardpass-batch-rows"] == "3"


def test_the_description_names_every_path(http: HttpCaller) -> None:
    document = http.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
    for path, operations in document["paths"].items():
        for method in operations:
            answer = http.ask(method.upper(), re.sub(r"\{\w+\}", "nothing", path), b"{}" if method == "post" else None)
            known = (
                answer.status != 404 or "is no model" in answer.error or "no model" in answer.error or "region" in path
            )
            assert answer.status != 405 and known, (method, path, answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("GET", "/v2/", 404), ("GET", "/v3", 404), ("GET", "/v2/models/none", 404),
        ("POST", "/v2/models/none/infer", 404), ("GET", "/v2/models/chain/versions/9/ready", 404),
        ("DELETE", "/v2/models/chain", 405), ("GET", "/v2/models/chain/infer", 405), ("PUT", "/v2", 405),
        ("GET", "/v2/models/%ff/ready", 404), ("GET", "/v2/models/..%2f..%2fetc/config", 404),
    ],
)  # fmt: skip
def test_what_is_not_there(http: HttpCaller, method: str, path: str, status: int) -> None:
    body = {"inputs": [tensor(ROWS)]} if method == "POST" else None
    answer = http.ask(method, path, body)
    assert answer.status == status and answer.error


def test_tokens_and_tls(repository: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("infer reader-reader-reader\nadmin keeper-keeper-keeper\n")
    options = ["--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key), "--tokens", str(tokens)]
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2", "http/1.1"])  # as curl offers
    with ServerProcess(repository, *options, "--model-control", "explicit", "--load-model", "chain") as server:
        assert server.http_url.startswith("https://")
        http = HttpCaller(server.http_url, context)
        assert http.get("/v2/health/ready").status == 200
        refused = http.infer("chain", {"inputs": [tensor(ROWS)]})
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer" and refused.error
        reader, keeper = "Bearer reader-reader-reader", "Bearer keeper-keeper-keeper"
        assert http.infer("chain", {"inputs": [tensor(ROWS)]}, authorization=reader).status == 200
        assert http.post("/v2/repository/models/two/load", authorization=reader).status == 403
        assert http.post("/v2/repository/models/two/load", authorization=keeper).status == 200
        assert [http.get("/v2/flight", authorization=who).status for who in ("", reader, keeper)] == [401, 403, 200]
        http.close()
        assert server.stop() == 0
