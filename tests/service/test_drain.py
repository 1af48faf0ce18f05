"""Stopping in phases: NOT_SERVING while still accepting, then GOAWAY, then refusals, then what is in flight, exit 0.

No clock is compared: a long wait is ended by the second signal, and a long run keeps the server there to be asked.
"""

from __future__ import annotations

import contextlib
import http.client
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from caller import until
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.conformance.drains import CALLERS, drain_by_turns, drain_failures

from forwardpass import Client, protocol
from forwardpass.client.errors import CallError, Unavailable, Unimplemented
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
ROW = np.ones((1, 1), np.float32)
SERVING, NOT_SERVING = 1, 2
# The direct transport has closed its port by then, so that clients go elsewhere without having asked.
REFUSED = {"direct": "Connection refused", "grpcio": "the server is stopping"}
LONG_RUN = 3_000_000.0  # turns of `hold`: seconds, on any machine
ENDLESS = 1e15  # turns: a run that goes on until the server ends it


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    models.save(tmp_path, "hold", models.hold(), "instances = 3\n")
    return tmp_path


@pytest.fixture(params=["direct", "grpcio"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def _watch(address: str) -> Iterator[list[int]]:
    """The statuses that a server tells a watcher, as they come; entered once it has said its first word."""
    told: list[int] = []
    heard = threading.Event()
    with grpc.insecure_channel(address) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        def listen() -> None:
            try:
                for response in stream:
                    told.append(response.status)
                    heard.set()
            except grpc.RpcError:
                pass  # the server is gone

        thread = threading.Thread(target=listen)
        thread.start()
        assert heard.wait(60)
        try:
            yield told
        finally:
            stream.cancel()
            thread.join(60)


def _until(condition: Callable[[], bool], server: ServerProcess) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"it did not come to that:\n{server.tail()}")


def _said(server: ServerProcess, words: str) -> Callable[[], bool]:
    return lambda: any(words in line for line in server.lines)


def test_calls_are_accepted_after_watchers_are_told(repository: Path, transport: str, serve: Serve) -> None:
    server = serve(repository, "--transport", transport, "--drain-wait", "600")
    with Client(server.address, health_check=False, attempts=1) as old, _watch(server.address) as told:
        assert old.predict("hold", ROW) == ROW
        assert told == [SERVING]
        server.send(signal.SIGTERM)
        _until(lambda: told == [SERVING, NOT_SERVING], server)
        # One client that does not heed health keeps its connection, another comes anew: both are served.
        with Client(server.address, health_check=False, attempts=1) as new:
            for client in (old, new) * 20:
                assert client.predict("hold", ROW) == ROW
            assert not new.ready()
        assert server.returncode is None
        server.send(signal.SIGTERM)  # the wait is over
        assert server.wait() == 0
    assert told == [SERVING, NOT_SERVING]


def test_a_client_that_heeds_health_leaves_in_the_first_phase(repository: Path, transport: str, serve: Serve) -> None:
    """Two servers, one of them stops, and no call fails though none is made twice."""
    going = serve(repository, "--transport", transport, "--drain-wait", "600")
    staying = serve(repository, "--transport", transport)
    both = "ipv4:" + ",".join(server.address for server in (going, staying))
    with Client(both, attempts=1) as client, Client(going.address, attempts=1) as lone:
        for _ in range(50):
            client.predict("hold", ROW)
        going.send(signal.SIGTERM)

        def refused() -> bool:
            try:
                lone.predict("hold", ROW)
            except Unavailable:
                return True
            return False

        _until(refused, going)
        before = _answered(going)
        for _ in range(200):
            client.predict("hold", ROW)
        assert _answered(going) - before <= 1  # the one that may still have been on its way to being told
    going.send(signal.SIGTERM)
    assert going.wait() == 0


def _answered(server: ServerProcess) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in server.metrics().splitlines()
        if line.startswith("forwardpass_requests_total{") and 'code="OK"' in line
    )


def test_then_calls_are_refused_and_those_in_flight_answered(repository: Path, transport: str, serve: Serve) -> None:
    server = serve(repository, "--transport", transport, "--drain-wait", "0.5", "--grace", "600")
    with Client(server.address, health_check=False, attempts=1) as client, ThreadPoolExecutor(2) as pool:
        long, in_flight = _two_in_flight(server, client, pool)
        server.send(signal.SIGTERM)
        outcomes: list[str] = []

        def ask() -> bool:
            try:
                client.predict("hold", ROW, timeout=600)
            except CallError as error:
                outcomes.append(type(error).__name__)
                assert REFUSED[transport] in str(error)
                return True
            outcomes.append("OK")
            return False

        _until(ask, server)
        assert set(outcomes[:-1]) == {"OK"} and outcomes[-1] == "Unavailable"
        assert in_flight.result() == long
        server.send(signal.SIGTERM)  # the endless one is ended
    assert server.wait() == 0
    assert _said(server, "stopped")()


def _two_in_flight(server: ServerProcess, client: Client, pool: ThreadPoolExecutor) -> tuple[Any, Future[Any]]:
    """A run of seconds, with its answer, and an endless one: until that is ended, the server is there to be asked."""
    long = np.full((1, 1), LONG_RUN, np.float32)
    pool.submit(client.predict, "hold", np.full((1, 1), ENDLESS, np.float32), timeout=600)
    _until(lambda: _running(server) == 1, server)
    in_flight = pool.submit(client.predict, "hold", long, timeout=600)
    _until(lambda: _running(server) == 2, server)
    return long, in_flight


def _running(server: ServerProcess) -> float:
    return next(
        float(line.rsplit(" ", 1)[1])
        for line in server.metrics().splitlines()
        if line.startswith("forwardpass_running_requests{")
    )


def test_without_a_wait_calls_are_refused_at_once(repository: Path, transport: str, serve: Serve) -> None:
    server = serve(repository, "--transport", transport, "--grace", "600")
    with Client(server.address, health_check=False, attempts=1) as client, ThreadPoolExecutor(2) as pool:
        long, in_flight = _two_in_flight(server, client, pool)
        server.send(signal.SIGTERM)
        _until(_said(server, "draining: 2 requests in flight"), server)
        with pytest.raises(Unavailable, match=REFUSED[transport]):
            client.predict("hold", ROW)
        assert in_flight.result() == long
        server.send(signal.SIGTERM)  # the endless one is ended
    assert server.wait() == 0


def test_callers_that_ask_nobodys_health_lose_no_call(repository: Path, tmp_path: Path) -> None:
    """Two servers that are stopped and started anew by turns under grpcio's own round_robin, without retries."""
    client = [sys.executable, CALLERS / "callers.py"]
    request = protocol.ModelInferRequest(model_name="hold")
    request.inputs.add(name="x", datatype="FP32", shape=ROW.shape)
    request.raw_input_contents.append(ROW.tobytes())
    found = drain_by_turns(repository, request.SerializeToString(), tmp_path, client, 2)
    assert found["ok"] > 100
    assert drain_failures(found) == {}


def test_the_health_service_itself_is_alive_while_it_drains(repository: Path, transport: str, serve: Serve) -> None:
    """What a liveness probe asks for: a server that drains is not one to be killed."""
    server = serve(repository, "--transport", transport, "--drain-wait", "600")
    with _watch(server.address) as told:
        server.send(signal.SIGTERM)
        _until(lambda: told[-1] == NOT_SERVING, server)
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        status: dict[str, Any] = {
            name: check(health_pb2.HealthCheckRequest(service=name), timeout=60).status
            for name in ("", "hold", "inference.GRPCInferenceService", "grpc.health.v1.Health")
        }
    assert status == {
        "": NOT_SERVING,
        "hold": NOT_SERVING,
        "inference.GRPCInferenceService": NOT_SERVING,
        "grpc.health.v1.Health": SERVING,
    }
    server.send(signal.SIGTERM)
    assert server.wait() == 0


def test_a_connection_of_age_is_replaced_without_a_failed_call(repository: Path, transport: str, serve: Serve) -> None:
    server = serve(repository, "--transport", transport, "--max-connection-age", "0.3")
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(server.address) as channel:
        channel.subscribe(states.append)
        check = health_pb2_grpc.HealthStub(channel).Check

        def asked() -> bool:
            assert check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING
            return states.count(grpc.ChannelConnectivity.READY) >= 3

        _until(asked, server)


def test_probes_need_no_certificate(repository: Path, tmp_path: Path, serve: Serve) -> None:
    """On the port for health alone, which has no other service; it follows the server into its drain."""
    authority = Authority(tmp_path / "authority")
    pair = authority.issue("server")
    server = serve(
        repository, "--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key),
        "--tls-client-ca", str(authority.certificate), "--health-port", "0", "--drain-wait", "600",
    )  # fmt: skip
    address = next(line.removeprefix("health ") for line in server.lines if line.startswith("health "))
    with Client(address, attempts=1, health_check=False) as client, pytest.raises(Unimplemented):
        client.predict("hold", ROW)
    with _watch(address) as told:
        assert told == [SERVING]
        server.send(signal.SIGTERM)
        _until(lambda: told == [SERVING, NOT_SERVING], server)
        server.send(signal.SIGTERM)
        assert server.wait() == 0


def test_http_clients_are_asked_to_leave_before_any_is_refused(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path)
    host, _, port = server.http_url.removeprefix("http://").rpartition(":")
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}]}'
    statuses: list[int] = []
    errors: list[BaseException] = []

    def call() -> None:
        """Keep one connection, and leave when that is asked for; the end is that nobody is there any more."""
        try:
            while True:
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                leaves = False
                while not leaves:
                    connection.request("POST", "/v2/models/m/infer", body)
                    response = connection.getresponse()
                    statuses.append(response.status)
                    leaves = response.will_close
                    response.read()
                    time.sleep(0.1)  # as clients have something to do between two requests
                connection.close()
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(statuses) > 10, "responses")
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    assert {*statuses} == {200}
    assert {type(error) for error in errors} == {ConnectionRefusedError}, errors
