"""ModelStatistics of a real server, asked for by tritonclient: what was sent is what was counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.service.caller import Caller, request, until
from tests.service.models import chain, hold, save, table
from tritonclient.utils import np_to_triton_dtype as triton_type

from forwardpass.testing.server_process import ServerProcess

Client = triton.InferenceServerClient


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("statistics")
    for version in (1, 2):
        save(repository, "m", chain(), 'versions = "all"\nmax_batch_size = 4', version=version)
    save(repository, "table", table())
    with ServerProcess(repository, "--transport", request.param) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def send(client: Client, rows: int = 1, model: str = "m", value: int = 1, **more: Any) -> None:
    dtype = np.int64 if model == "table" else np.float32
    x = np.full((rows, 4 if model == "m" else 1), value, dtype)
    tensor = triton.InferInput("x", list(x.shape), triton_type(dtype))
    tensor.set_data_from_numpy(x)
    client.infer(model, [tensor], **more)


def of(client: Client, model: str = "m", version: str = "2") -> Any:
    (found,) = client.get_inference_statistics(model, version).model_stats
    return found


def test_what_was_sent_is_what_was_counted(client: Client) -> None:
    before = of(client)
    sent = [1, 3, 4, 1, 2]
    began = time.monotonic()
    for rows in sent:
        send(client, rows)
    after = of(client)
    took = time.monotonic() - began  # counting included, which follows a response and precedes the statistics
    assert int(after.version) == 2
    assert after.inference_count - before.inference_count == sum(sent)
    assert after.execution_count - before.execution_count == len(sent)
    spent = {}
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        was, now = getattr(before.inference_stats, name), getattr(after.inference_stats, name)
        assert now.count - was.count == len(sent), name
        spent[name] = now.ns - was.ns
    assert 0 < spent["success"] < took * 1e9
    parts = spent["queue"] + spent["compute_input"] + spent["compute_infer"] + spent["compute_output"]
    assert parts == pytest.approx(spent["success"], rel=1e-3, abs=1000)
    assert after.inference_stats.fail.count == before.inference_stats.fail.count
    assert abs(after.last_inference - time.time() * 1e3) < 10_000
    sizes = {b.batch_size: b.compute_infer.count for b in after.batch_stats}
    assert {1, 2, 3, 4} <= sizes.keys()
    assert sum(sizes.values()) == after.execution_count
    assert sum(size * count for size, count in sizes.items()) == after.inference_count
    assert sum(b.compute_infer.ns for b in after.batch_stats) > 0


def test_a_request_larger_than_a_batch_is_one_request_in_several_runs(client: Client) -> None:
    before = of(client)
    send(client, 10)
    after = of(client)
    assert after.execution_count - before.execution_count == 3
    assert after.inference_count - before.inference_count == 10
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1


def test_failures_are_counted_apart(client: Client) -> None:
    before = of(client, "table", "1").inference_stats
    send(client, model="table")
    with pytest.raises(triton.InferenceServerException):
        send(client, model="table", value=99)  # not in the table
    after = of(client, "table", "1").inference_stats
    assert after.success.count - before.success.count == 1
    assert after.fail.count - before.fail.count == 1
    assert after.fail.ns > before.fail.ns


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_who_waited_in_vain_for_an_instance_failed(
    tmp_path: Path, serve: Callable[..., ServerProcess], transport: str
) -> None:
    save(tmp_path, "hold", hold())
    options = ("--inline-run-limit", "0", "--instances", "1", "--grace", "0.1")
    caller = Caller(serve(tmp_path, "--transport", transport, *options))
    holder = caller.start(request("hold", np.full((1, 1), 1e15, np.float32)))  # until the server ends
    until(lambda: caller.metric("forwardpass_running_requests") == 1)
    with Client(caller.server.address) as client:
        with pytest.raises(triton.InferenceServerException, match="DEADLINE_EXCEEDED"):
            send(client, model="hold", timeout=1)  # a microsecond
        found = of(client, "hold", "1").inference_stats
    assert (found.success.count, found.fail.count) == (0, 1) and found.fail.ns > 0
    assert not holder.done()
    caller.close()


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("", "", [("m", "1"), ("m", "2"), ("table", "1")]),
        ("m", "", [("m", "1"), ("m", "2")]),
        ("m", "1", [("m", "1")]),
        ("table", "", [("table", "1")]),
    ],
)
def test_whose_statistics_are_told(client: Client, name: str, version: str, found: list[tuple[str, str]]) -> None:
    stats = client.get_inference_statistics(name, version).model_stats
    assert [(s.name, s.version) for s in stats] == found
    assert all(s.inference_stats.HasField("cache_hit") for s in stats)  # tools read what is zero, too


@pytest.mark.parametrize(("name", "version"), [("nothing", ""), ("m", "7")])
def test_whose_statistics_there_are_none_of(client: Client, name: str, version: str) -> None:
    with pytest.raises(triton.InferenceServerException) as refused:
        client.get_inference_statistics(name, version)
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_counters_go_on_over_a_reload(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    save(tmp_path, "m", chain(seed=1))
    running = serve(tmp_path, "--model-control", "explicit", "--load-model", "*")
    with Client(running.address) as client:
        for seed in (2, 3):
            send(client)
            (tmp_path / "m" / "1" / "model.onnx").write_bytes(chain(seed=seed).SerializeToString())
            client.load_model("m")
        send(client)
        assert of(client, "m", "1").inference_stats.success.count == 3
    assert 'forwardpass_requests_total{code="OK",model="m",version="1"} 3.0' in running.metrics()
