"""Models that are loaded by their first request and evicted for others, over both transports and HTTP."""

from __future__ import annotations

import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import onnx
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tests.service import models
from tests.service.caller import Caller, Refused, outputs, request, until

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]

X = np.arange(8, dtype=np.float32).reshape(2, 4)
GATED = """
[[warm_up]]
name = "gate"
inputs.x = { datatype = "FP32", dims = [4], data = "file", file = "gate" }
"""


class Gate:
    """A model whose load goes on only once it is opened: its warm-up reads a pipe."""

    def __init__(self, repository: Path, name: str) -> None:
        models.save(repository, name, models.chain(), GATED)
        folder = repository / name / "warmup"
        folder.mkdir()
        self.pipe = folder / "gate"
        os.mkfifo(self.pipe)
        self._opened = False

    def entered(self) -> bool:
        """Whether a load waits at it; opens nothing."""
        try:
            descriptor = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads
            return False
        self._descriptor = descriptor
        return True

    def open(self) -> None:
        """Let the load go on that has `entered`, once."""
        with os.fdopen(self._descriptor, "wb") as pipe:
            pipe.write(np.zeros(4, np.float32).tobytes())


@pytest.fixture(params=["direct", "grpcio"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def on_demand(serve: Serve, transport: str) -> Callable[..., ServerProcess]:
    return lambda folder, *more: serve(folder, "--model-control", "on-demand", "--transport", transport, *more)


def index(caller: Caller) -> dict[str, tuple[str, str]]:
    answer, _ = caller.send(protocol.RepositoryIndexRequest(), path=protocol.METHODS["RepositoryIndex"].path)
    found = protocol.RepositoryIndexResponse.FromString(answer).models
    return {model.name: (model.state, model.reason) for model in found}


def ready(caller: Caller, name: str) -> bool:
    path = protocol.METHODS["ModelReady"].path
    answer, _ = caller.send(protocol.ModelReadyRequest(name=name), path=path)
    return bool(protocol.ModelReadyResponse.FromString(answer).ready)


def counted(server: ServerProcess, metric: str) -> dict[str, float]:
    families = {f.name: f for f in text_string_to_metric_families(server.metrics())}
    family = families.get(f"forwardpass_{metric}")
    return {s.labels.get("model", ""): s.value for s in family.samples} if family is not None else {}


def repository(folder: Path, **networks: onnx.ModelProto) -> Path:
    for name, network in networks.items():
        models.save(folder, name, network)
    return folder


def test_the_first_request_loads_and_answers(on_demand: Serve, tmp_path: Path) -> None:
    server = on_demand(repository(tmp_path, a=models.chain(seed=1), b=models.chain(seed=2)))
    with closing(Caller(server)) as caller:
        assert not any(line.startswith("model ") for line in server.lines)
        state, reason = index(caller)["a"]
        assert (state, reason) == ("UNAVAILABLE", "not loaded yet: its first request loads it")
        assert not ready(caller, "a") and index(caller)["a"][0] == "UNAVAILABLE"
        stub = health_pb2_grpc.HealthStub(caller.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service="a")).status == 1
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: caller.infer("a", X)[0].tobytes(), range(16)))
        assert len(set(found)) == 1
        assert ready(caller, "a") and index(caller)["a"] == ("READY", "")
        assert counted(server, "model_on_demand_loads") == {"a": 1.0}
        metadata = caller.send(protocol.ModelMetadataRequest(name="b"), path=protocol.METHODS["ModelMetadata"].path)[0]
        assert [t.name for t in protocol.ModelMetadataResponse.FromString(metadata).inputs] == ["x"]
        assert caller.refused(request("c", X)).code == "NOT_FOUND"
        assert "no version '7'" in caller.refused(request("a", X, model_version="7")).text


def test_a_load_holds_up_only_its_own_calls(on_demand: Serve, tmp_path: Path) -> None:
    gate = Gate(tmp_path, "slow")
    server = on_demand(repository(tmp_path, quick=models.chain(seed=3), other=models.chain(seed=4)))
    with closing(Caller(server)) as caller, ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(caller.infer, "slow", X) for _ in range(4)]
        until(gate.entered)
        assert index(caller)["slow"][0] == "LOADING"
        # Other models load and answer; a deadline ends a wait; a client that leaves is forgotten.
        assert caller.infer("quick", X)[0].shape == caller.infer("other", X)[0].shape == (2, 3)
        assert caller.refused(request("slow", X), timeout=0.3).code == "DEADLINE_EXCEEDED"
        left = caller.channel.unary_unary(protocol.METHODS["ModelInfer"].path).future(
            request("slow", X).SerializeToString(), timeout=60
        )
        until(lambda: counted(server, "in_flight_requests")[""] == 5)
        left.cancel()
        until(lambda: counted(server, "in_flight_requests")[""] == 4)
        assert not any(call.done() for call in waiting)
        gate.open()
        assert len({call.result(60)[0].tobytes() for call in waiting}) == 1
        until(lambda: counted(server, "in_flight_requests")[""] == 0)
        assert counted(server, "model_on_demand_loads") == {"slow": 1.0, "quick": 1.0, "other": 1.0}


def test_a_stream_and_large_messages_wait_as_well(on_demand: Serve, tmp_path: Path) -> None:
    wide = models.chain((40_000, 4))
    server = on_demand(repository(tmp_path, streamed=models.chain(), wide=wide, packed=models.chain((40_000, 3))))
    rows = np.ones((2, 40_000), np.float32)
    with closing(Caller(server)) as caller:
        path = protocol.METHODS["ModelStreamInfer"].path
        sent = [request("streamed", X).SerializeToString() for _ in range(3)]
        answers = [
            protocol.ModelStreamInferResponse.FromString(a)
            for a in caller.channel.stream_stream(path)(iter(sent), timeout=60)
        ]
        assert [a.error_message for a in answers] == [""] * 3
        assert caller.infer("wide", rows)[0].shape == (2, 4)
        packed = caller.channel.unary_unary(protocol.METHODS["ModelInfer"].path)
        answer = packed(request("packed", rows).SerializeToString(), timeout=60, compression=grpc.Compression.Gzip)
        assert outputs(answer)[0].shape == (2, 3)
        assert caller.refused(request("no such model", rows)).code == "NOT_FOUND"


def test_http_loads_as_well(serve: Serve, tmp_path: Path) -> None:
    server = serve(
        repository(tmp_path, a=models.chain(), b=models.chain(), c=models.chain()), "--model-control", "on-demand"
    )

    def post(path: str, body: object) -> object:
        sent = urllib.request.Request(server.http_url + path, orjson.dumps(body), method="POST")
        with urllib.request.urlopen(sent, timeout=60) as answer:
            return orjson.loads(answer.read())

    rows = X.ravel().tolist()
    inputs = [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": rows}]
    assert post("/v2/models/a/infer", {"inputs": inputs})["outputs"][0]["shape"] == [2, 3]  # type: ignore[index]
    assert len(post("/v1/models/b:predict", {"instances": X.tolist()})["predictions"]) == 2  # type: ignore[index]
    with urllib.request.urlopen(server.http_url + "/v2/models/c", timeout=60) as answer:
        assert orjson.loads(answer.read())["inputs"][0]["name"] == "x"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        post("/v2/models/d/infer", {"inputs": inputs})


def test_a_failing_load_answers_with_the_reason_and_is_not_tried_at_every_request(
    on_demand: Serve, tmp_path: Path
) -> None:
    folder = models.save(tmp_path, "broken", models.chain())
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[:40])
    server = on_demand(tmp_path, "--poll-seconds", "0.2")
    with closing(Caller(server)) as caller:
        for _ in range(20):
            refused = caller.refused(request("broken", X))
            assert refused.code == "FAILED_PRECONDITION" and "not an ONNX file" in refused.text
            assert refused.retry_after() is not None
        failures = counted(server, "model_load_failures")["broken"]
        assert 1 <= failures < 20
        assert index(caller)["broken"][0] == "UNAVAILABLE" and "not an ONNX file" in index(caller)["broken"][1]
        # A changed folder is seen by the next look, and ends the pause.
        (folder / "model.onnx").write_bytes(whole)
        until(lambda: _answers(caller, "broken"))


def _answers(caller: Caller, name: str) -> bool:
    try:
        return bool(caller.infer(name, X))
    except Refused:
        return False


def test_what_changes_in_the_folder_is_found(on_demand: Serve, tmp_path: Path) -> None:
    server = on_demand(repository(tmp_path, a=models.chain(seed=1)), "--poll-seconds", "3600")
    with closing(Caller(server)) as caller:
        first = caller.infer("a", X)[0]
        models.save(tmp_path, "new", models.chain(seed=5))
        assert caller.infer("new", X)[0].shape == (2, 3), "a new folder, at its first request"
        models.save(tmp_path, "a", models.chain(seed=9), version=2)
        assert caller.infer("a", X)[0].tobytes() == first.tobytes(), "a loaded model serves until the next look"
        answer, _ = caller.send(request("a", X, model_version="2"))
        assert outputs(answer)[0].tobytes() != first.tobytes(), "a version that is named is looked for"


def test_gone_and_changed_models_are_seen_by_the_look(on_demand: Serve, tmp_path: Path) -> None:
    server = on_demand(repository(tmp_path, a=models.chain(seed=1), b=models.chain(seed=2)), "--poll-seconds", "0.2")
    with closing(Caller(server)) as caller:
        first = caller.infer("a", X)[0].tobytes()
        shutil.rmtree(tmp_path / "b")
        until(lambda: "b" not in index(caller))
        assert caller.refused(request("b", X)).code == "NOT_FOUND"
        models.save(tmp_path, "a", models.chain(seed=9), version=2)
        until(lambda: caller.infer("a", X)[0].tobytes() != first)


WIDE = 1024  # 8 MiB of weights in two layers


def wide(seed: int) -> onnx.ModelProto:
    return models.chain((4, WIDE, WIDE, WIDE, 3), seed=seed)


def test_the_least_recently_used_is_evicted(on_demand: Serve, tmp_path: Path) -> None:
    server = on_demand(repository(tmp_path, a=wide(1), b=wide(2), c=wide(3)), "--model-memory", "20MiB")
    with closing(Caller(server)) as caller:
        answers = {name: caller.infer(name, X)[0].tobytes() for name in "ab"}
        caller.infer("a", X)
        answers["c"] = caller.infer("c", X)[0].tobytes()
        assert ready(caller, "a") and not ready(caller, "b") and ready(caller, "c")
        state, reason = index(caller)["b"]
        assert state == "UNAVAILABLE" and reason.startswith("evicted: c needed 8.")
        assert counted(server, "model_evictions") == {"b": 1.0}
        assert 16 << 20 < counted(server, "model_memory_bytes")[""] <= 20 << 20
        # Round and round: every answer is right, and counters go on over evictions.
        for name in "bcab":
            until(lambda name=name: _answers(caller, name))  # type: ignore[misc]
            assert caller.infer(name, X)[0].tobytes() == answers[name]
        assert counted(server, "model_evictions")["b"] >= 1
        served = counted(server, "rows")
        assert served["b"] >= 6


def test_what_can_never_fit_is_refused_with_the_figures(on_demand: Serve, tmp_path: Path) -> None:
    server = on_demand(repository(tmp_path, large=wide(1), small=models.chain()), "--model-memory", "4MiB")
    with closing(Caller(server)) as caller:
        assert caller.infer("small", X)[0].shape == (2, 3)
        refused = caller.refused(request("large", X))
        assert refused.code == "RESOURCE_EXHAUSTED"
        assert "takes 8." in refused.text and "--model-memory is 4 MiB" in refused.text
        assert ready(caller, "small"), "nothing is evicted in vain"
        assert counted(server, "model_evictions") == {}


def test_a_model_with_requests_is_not_evicted(on_demand: Serve, tmp_path: Path) -> None:
    held = models.hold()
    server = on_demand(repository(tmp_path, held=held, a=wide(1), b=wide(2)), "--model-memory", "9MiB")
    turns = np.full((1, 1), 1e12, np.float32)
    with closing(Caller(server)) as caller:
        caller.infer("held", np.zeros((1, 1), np.float32))
        run = caller.channel.unary_unary(protocol.METHODS["ModelInfer"].path).future(
            request("held", turns).SerializeToString(), timeout=600
        )
        until(lambda: counted(server, "running_requests").get("held") == 1)
        caller.infer("a", X)
        caller.infer("b", X)
        assert ready(caller, "held") and not ready(caller, "a")
        run.cancel()


def test_a_server_that_stops_answers_those_who_wait(on_demand: Serve, tmp_path: Path) -> None:
    gate = Gate(tmp_path, "slow")
    server = on_demand(tmp_path, "--grace", "2")
    with closing(Caller(server)) as caller, ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(caller.refused, request("slow", X)) for _ in range(3)]
        until(gate.entered)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: any("draining" in line for line in server.lines))
        gate.open()
        assert {call.result(60).code for call in waiting} == {"UNAVAILABLE"}
        stopping.join(60)
        assert server.returncode == 0, server.tail()
