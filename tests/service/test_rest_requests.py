"""Wrong and unusual requests over HTTP, each with the status and the words it must have, while others are answered.

The same cases are tried over gRPC in test_faults.py and test_faults_in_flight.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from caller import Caller, until
from http_caller import HttpCaller, binary, tensor

from forwardpass.testing.server_process import ServerProcess

ROW = np.arange(4, dtype=np.float32).reshape(1, 4)
GOOD = {"inputs": [tensor(ROW)]}
TURNS = 1_500_000.0  # of `hold`: a second or more


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), "max_batch_size = 64\n")
    models.save(root, "few", models.chain(), "max_batch_size = 4\nmax_request_rows = 10\n")
    models.save(root, "two", models.two_by_two(), "max_batch_size = 64\n")
    models.save(root, "text", models.echo(models.STRING), "max_batch_size = 64\n")
    models.save(root, "any", models.relu_any_width(), "max_batch_size = 64\n")
    models.save(root, "table", models.table(), "max_batch_size = 16\nmax_queue_delay_us = 20000\n")
    models.save(root, "allocate", models.allocate(), "max_batch_size = 4\n")
    models.save(root, "hold", models.hold(), "max_batch_size = 4\ninstances = 1\n")
    broken = models.save(root, "broken", models.chain())
    (broken / "model.onnx").write_bytes(b"\x08\x07 this is no network")
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--model-control", "explicit", "--load-model", "*") as running:
        yield running
        assert running.stop() == 0, running.tail()
        assert not [line for line in running.lines if "Traceback" in line], running.tail()


@pytest.fixture
def grpc(server: ServerProcess) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


@pytest.fixture
def http(server: ServerProcess, grpc: Caller) -> Iterator[HttpCaller]:
    with closing(HttpCaller(server.http_url)) as caller:
        before = caller.infer("chain", GOOD).body
        yield caller
        assert caller.get("/v2/health/ready").status == 200
        assert caller.infer("chain", GOOD).body == before
        until(grpc.idle, "an idle server")


def of(**more: Any) -> dict[str, Any]:
    return {"inputs": [tensor(ROW) | more]}


A, N = tensor(ROW[:, :3], name="a"), tensor(np.ones((1, 1), np.int64), "INT64", "n")


@pytest.mark.parametrize(
    ("model", "body", "status", "text"),
    [
        ("none", GOOD, 404, "none"),
        ("../chain", GOOD, 404, "there is no"),
        ("%00", GOOD, 404, r"\x00"),
        ("x" * 5000, GOOD, 400, "the model name has 5000 characters"),
        ("broken", GOOD, 503, "could not be loaded"),
        ("two", {"inputs": [A]}, 400, "missing input 'n'"),
        ("two", {"inputs": [A, N, A]}, 400, "input 'a' is given twice"),
        ("two", {"inputs": [A, N | {"shape": [2, 1], "data": [1, 2]}]}, 400, "differ in their number of rows"),
        ("chain", of(shape=[1, 4, 1]), 400, "expected 2 dimensions [-1,4], got [1,4,1]"),
        ("chain", of(shape=[-1, 4]), 400, "a whole number of at least 0"),
        ("chain", of(shape=[2**62, 4]), 400, "below 4611686018427387904, got"),
        ("chain", of(shape=[2, 4]), 400, "has 8 elements, got 4"),
        ("few", {"inputs": [tensor(np.zeros((11, 4), np.float32))]}, 400, "11 rows in one request"),
        ("chain", GOOD | {"outputs": [{"name": "y"}, {"name": "y"}]}, 400, "output 'y' is requested twice"),
        ("chain", GOOD | {"parameters": {"priority": 9}}, 400, "parameter 'priority'"),
        ("chain", GOOD | {"id": "x" * 100_000}, 400, "the id has 100000 characters"),
        ("table", {"inputs": [tensor(np.full((1, 1), 99), "INT64")]}, 400, "99"),
        ("allocate", {"inputs": [tensor(np.full((1, 1), 2**37), "INT64")]}, 413, "memory"),
    ],
    ids=range(18),
)
def test_it_is_refused_by_name(http: HttpCaller, model: str, body: Any, status: int, text: str) -> None:
    answer = http.infer(model, body)
    assert answer.status == status and text in answer.error, answer


def test_a_text_whose_length_lies(http: HttpCaller) -> None:
    head = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"BYTES","parameters":{"binary_data_size":9}}]}'
    body = head + b"\x01\0\0\0a\xff\0\0\0"
    answer = http.infer("text", body, inference_header_content_length=str(len(head)))
    assert answer.status == 400 and "element 1 claims 255 bytes, 0 are left" in answer.error
    body = head + b"\x01\0\0\0\xff\0\0\0\0"
    answer = http.infer("text", body, inference_header_content_length=str(len(head)))
    assert answer.status == 400 and "element 0 is not UTF-8" in answer.error


def test_no_rows_and_odd_numbers_are_answered(http: HttpCaller, grpc: Caller) -> None:
    empty = http.infer("chain", {"inputs": [tensor(np.zeros((0, 4), np.float32))]})
    assert empty.json["outputs"][0] == {"name": "y", "datatype": "FP32", "shape": [0, 3], "data": []}
    odd = np.array([[np.nan, np.inf, -np.inf, 1e-42]], np.float32)
    body, length = binary({"x": odd})
    answer = http.infer("any", body, inference_header_content_length=str(length))
    start = int(answer.headers["inference-header-content-length"])
    assert answer.body[start:] == grpc.infer("any", odd)[0].tobytes()


def test_of_one_batch_only_the_culprit_fails(http: HttpCaller, grpc: Caller, server: ServerProcess) -> None:
    isolated = grpc.metric("forwardpass_isolated_total", model="table")
    answers: dict[int, Any] = {}

    def ask(value: int) -> None:
        with closing(HttpCaller(server.http_url)) as caller:
            answers[value] = caller.infer("table", {"inputs": [tensor(np.full((1, 1), value), "INT64")]})

    while grpc.metric("forwardpass_isolated_total", model="table") == isolated:  # until they share a batch
        threads = [threading.Thread(target=ask, args=(value,)) for value in (0, 1, 2, 3, 99)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers.pop(99).status == 400
        assert {v: a.json["outputs"][0]["data"] for v, a in answers.items()} == {v: [10 * v] for v in range(4)}
        answers.clear()


def test_rows_of_different_sizes_are_never_mixed(http: HttpCaller, server: ServerProcess) -> None:
    def ask(width: int) -> None:
        with closing(HttpCaller(server.http_url)) as caller:
            rows = np.full((1, width), width, np.float32)
            found[width] = caller.infer("any", {"inputs": [tensor(rows)]}).json["outputs"][0]["data"]

    found: dict[int, list[float]] = {}
    threads = [threading.Thread(target=ask, args=(width,)) for width in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {width: [width] * width for width in range(1, 9)}


def test_a_deadline_that_passes_in_the_queue(http: HttpCaller, grpc: Caller, server: ServerProcess) -> None:
    def wait() -> None:
        with closing(HttpCaller(server.http_url)) as caller:
            answers.append(caller.infer("hold", {"inputs": [tensor(np.full((1, 1), TURNS, np.float32))]}))

    answers: list[Any] = []
    running = threading.Thread(target=wait)
    running.start()
    until(lambda: grpc.metric("forwardpass_running_requests", model="hold") == 1, "the long run")
    rows = grpc.metric("forwardpass_rows_total", model="hold")
    late = http.infer("hold", {"inputs": [tensor(np.ones((1, 1), np.float32))]}, x_request_timeout="50ms")
    assert late.status == 504 and late.error
    running.join()
    assert answers[0].status == 200
    assert grpc.metric("forwardpass_rows_total", model="hold") == rows + 1, "what was late was never run"


def test_a_reload_that_fails_leaves_what_serves(http: HttpCaller, repository: Path) -> None:
    file = repository / "few" / "1" / "model.onnx"
    good = file.read_bytes()
    before = http.infer("few", GOOD).json
    file.write_bytes(good[:100])
    try:
        answer = http.post("/v2/repository/models/few/load")
        assert answer.status == 503 and "few" in answer.error
        assert http.infer("few", GOOD).json == before
    finally:
        file.write_bytes(good)
    assert http.post("/v2/repository/models/few/load").status == 200


def test_control_characters_stay_on_one_line(http: HttpCaller, server: ServerProcess) -> None:
    for name in ("a%0Ab", "a%0D%0Ab%09", "%1b[31m"):
        answer = http.infer(name, GOOD)
        assert answer.status == 404 and "\\x" in answer.error
    answer = http.infer("chain", GOOD | {"id": "line\nline\x00"})
    assert answer.json["id"] == "line\nline\x00"
    assert not [line for line in server.lines if line.startswith("b'") or line == "b"]


def test_a_page_of_another_site_cannot_call(http: HttpCaller) -> None:
    own = f"{http.address[0]}:{http.address[1]}"
    for origin in ("https://evil.example", "null", f"http://{own}.evil.example", "http://localhost:1"):
        for path in ("/v2/models/chain/infer", "/v2/repository/models/chain/unload", "/v2/logging"):
            answer = http.post(path, GOOD, origin=origin, content_type="text/plain")
            assert answer.status == 403 and "Origin" in answer.error
    assert http.infer("chain", GOOD, origin=f"http://{own}").status == 200
