"""grpc.health.v1 by a foreign client: of the server, of each model by its name, and watched while models change."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import models
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

SECONDS = 60.0
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("health")
    models.save(folder, "one", models.chain())
    models.save(folder, "two", models.chain())
    with ServerProcess(
        folder, "--transport", request.param, "--model-control", "explicit", "--load-model", "one"
    ) as server:
        yield server


@pytest.fixture
def channel(running: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.address) as channel:
        yield channel


def control(channel: grpc.Channel, method: str, model: str) -> None:
    what = protocol.METHODS[method]
    call = channel.unary_unary(what.path, what.request.SerializeToString, what.response.FromString)
    call(what.request(model_name=model), timeout=SECONDS)


def check(channel: grpc.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS).status
    return status


@pytest.mark.parametrize("service", ["", protocol.INFERENCE_SERVICE, "one"])
def test_the_server_and_a_model_serve(channel: grpc.Channel, service: str) -> None:
    assert check(channel, service) == SERVING


def test_what_is_not_there_is_not_found(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(channel, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_is_told_when_a_model_comes_and_goes(channel: grpc.Channel) -> None:
    told: queue.Queue[int] = queue.Queue()
    stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="two"))

    def listen() -> None:
        try:
            for response in stream:
                told.put(response.status)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.CANCELLED

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        first = told.get(timeout=SECONDS)
        assert first in (SERVICE_UNKNOWN, NOT_SERVING)
        for _ in range(2):
            control(channel, "RepositoryModelLoad", "two")
            while (status := told.get(timeout=SECONDS)) != SERVING:
                assert status in (NOT_SERVING, SERVICE_UNKNOWN)
            assert check(channel, "two") == SERVING and check(channel, "one") == SERVING
            control(channel, "RepositoryModelUnload", "two")
            assert told.get(timeout=SECONDS) in (NOT_SERVING, SERVICE_UNKNOWN)
            assert check(channel, "") == SERVING, "one model is not the server"
    finally:
        stream.cancel()
        thread.join()
