"""Restarts and failures under load: several real servers behind the client library, and behind a real Envoy.

What Kubernetes does around them is played: a server is told to stop, and comes back at the same address. Latencies go
into the table and are not asserted.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.deploy.conftest import Figure
from tests.deploy.envoy import Envoy
from tests.service import models

from forwardpass import Client
from forwardpass.client.errors import CallError
from forwardpass.testing.server_process import ServerProcess

pytestmark = pytest.mark.slow

CALLERS = 4
PAUSE = 0.002  # seconds between two calls of one caller
CALM = 2.0  # seconds of load before and after
WAIT = "1"  # seconds of the drain's first phase
ROWS = np.linspace(0, 1, 4 * 64, dtype=np.float32).reshape(4, 64)


def free_ports(number: int) -> list[int]:
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _metric(server: ServerProcess, name: str, label: str = "") -> float:
    """The sum of a metric's samples that have that label."""
    lines = [line for line in server.metrics().splitlines() if re.match(rf"{name}[ {{]", line) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Fleet:
    """Servers on ports of their own, that come back at the same ones."""

    def __init__(self, number: int, repository: Path, transport: str) -> None:
        self._repository = repository
        self._options = ("--transport", transport, "--drain-wait", WAIT)
        self.ports = free_ports(number)
        self.addresses = [f"127.0.0.1:{port}" for port in self.ports]
        self.servers = [self._start(port) for port in self.ports]

    def _start(self, port: int) -> ServerProcess:
        return ServerProcess(self._repository, *self._options, "--grpc-port", str(port))

    @property
    def target(self) -> str:
        """All of them, for a gRPC client to balance over."""
        return "ipv4:" + ",".join(self.addresses)

    def restart(self, number: int) -> None:
        """Stop one as Kubernetes does, and start it again. Once it is ready, and not before, is this over."""
        assert self.servers[number].stop() == 0, self.servers[number].tail()
        self.servers[number] = self._start(self.ports[number])

    def kill(self, number: int) -> None:
        self.servers[number].kill()

    def answered(self) -> list[float]:
        """Requests that each has answered since it started."""
        return [_metric(server, "forwardpass_requests_total", 'code="OK"') for server in self.servers]

    def close(self) -> None:
        for server in self.servers:
            server.kill()


class Load:
    """Callers of one client, from when this is entered until it is left; every call has its phase."""

    def __init__(self, client: Client, model: str = "digits", rows: np.ndarray = ROWS) -> None:
        self._client, self._model, self._rows = client, model, rows
        self.phase = "before"
        self.seconds: dict[str, list[float]] = {}
        self.failures: dict[str, list[str]] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def _call(self) -> None:
        while not self._over.is_set():
            phase, began, failure = self.phase, time.monotonic(), ""
            try:
                self._client.predict(self._model, self._rows, timeout=10)
            except CallError as error:
                failure = f"{type(error).__name__}: {error}"
            took = time.monotonic() - began
            with self._lock:
                self.seconds.setdefault(phase, []).append(took)
                if failure:
                    self.failures.setdefault(phase, []).append(failure)
            time.sleep(PAUSE)

    def go_on(self, phase: str, seconds: float = 0.0) -> None:
        self.phase = phase
        time.sleep(seconds)

    def report(self, title: str, figure: Figure) -> None:
        """Rows of the table: calls, failures and p99, phase by phase."""
        for phase, seconds in self.seconds.items():
            failed = len(self.failures.get(phase, []))
            p99 = float(np.percentile(seconds, 99)) * 1e3
            figure(f"{title}, {phase}", f"{len(seconds)} calls, {failed} failed, p99 {p99:.1f} ms")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def fleet(digits_repository: Path) -> Iterator[Callable[[int, str], Fleet]]:
    with ExitStack() as stack:

        def make(number: int, transport: str) -> Fleet:
            made = Fleet(number, digits_repository, transport)
            stack.callback(made.close)
            return made

        yield make


def _called_again(made: Fleet, number: int) -> None:
    """Wait until a new server gets its share: a client that was refused there tries again after a while."""
    for _ in range(1000):
        if made.answered()[number] > 20:
            return
        time.sleep(0.02)
    raise AssertionError(f"server {number} is not called:\n{made.servers[number].tail()}")


@pytest.mark.parametrize(("number", "transport"), [(2, "direct"), (3, "direct"), (2, "grpcio")])
def test_a_rolling_restart_fails_no_call(
    number: int, transport: str, fleet: Callable[[int, str], Fleet], figure: Figure
) -> None:
    made = fleet(number, transport)
    with Client(made.target) as client, Load(client) as load:
        load.go_on("before", CALM)
        load.go_on("during")
        for i in range(number):
            made.restart(i)
            _called_again(made, i)
        load.go_on("after", CALM)
    load.report(f"rolling restart of {number} ({transport})", figure)
    assert not load.failures, load.failures


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_the_death_of_one_fails_no_call(transport: str, fleet: Callable[[int, str], Fleet], figure: Figure) -> None:
    made = fleet(2, transport)
    with Client(made.target) as client, Load(client) as load:
        load.go_on("before", CALM)
        load.go_on("after")
        made.kill(0)
        load.go_on("after", CALM)
    load.report(f"SIGKILL of one of two ({transport})", figure)
    assert not load.failures, load.failures


def test_without_retries_the_death_of_one_is_noticed(tmp_path: Path) -> None:
    """That the load above is one that can fail: calls in flight where a server dies are lost to who makes them once."""
    models.save(tmp_path, "hold", models.hold())
    with ServerProcess(tmp_path) as victim, Client(victim.address, attempts=1, health_check=False) as client:
        with Load(client, "hold", np.full((1, 1), 200_000.0, np.float32)) as load:
            load.go_on("before", 0.5)
            victim.kill()
            load.go_on("before", 0.2)
        assert load.failures


def test_load_is_spread_evenly(fleet: Callable[[int, str], Fleet], figure: Figure) -> None:
    made = fleet(3, "direct")
    with Client(made.target) as client:
        client.predict("digits", ROWS)
        time.sleep(1.0)  # connections to all of them
        before = made.answered()
        for _ in range(900):
            client.predict("digits", ROWS)
        shares = [after - then for after, then in zip(made.answered(), before, strict=True)]
    figure("900 calls over three servers", ", ".join(f"{share:.0f}" for share in shares))
    assert sum(shares) == 900
    assert max(abs(share - 300) for share in shares) <= 30


def test_through_envoy_a_rolling_restart_and_a_death_fail_no_call(
    fleet: Callable[[int, str], Fleet], tmp_path: Path, figure: Figure
) -> None:
    made = fleet(2, "direct")
    with Envoy(tmp_path, free_ports(2), made.addresses) as envoy:
        envoy.wait_for(2)
        with Client(envoy.address, health_check=False, attempts=1) as client:
            before = made.answered()
            for _ in range(400):
                client.predict("digits", ROWS)
            shares = [after - then for after, then in zip(made.answered(), before, strict=True)]
            figure("400 calls through Envoy over two servers", ", ".join(f"{share:.0f}" for share in shares))
            assert sum(shares) == 400 and max(abs(share - 200) for share in shares) <= 20
            with Load(client) as load:
                load.go_on("before", CALM)
                load.go_on("during")
                for i in range(2):
                    made.restart(i)
                    envoy.wait_for(2)
                load.go_on("after", CALM)
                load.go_on("one killed")
                made.kill(0)
                load.go_on("one killed", CALM)
    load.report("rolling restart through Envoy", figure)
    assert not load.failures, load.failures


def test_envoy_ejects_a_slow_server(tmp_path: Path, figure: Figure) -> None:
    """Two servers of one model, one of which takes far longer: what is late there is answered elsewhere."""
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    models.save(quick, "m", models.echo(shape=("batch", 1)))
    models.save(slow, "m", models.hold(), "max_batch_size = 1\n")
    rows = np.full((1, 1), 2_000_000.0, np.float32)  # turns of a loop, about a second, where it is `hold`
    with ExitStack() as stack:
        a, b = (stack.enter_context(ServerProcess(each, "--grace", "0")) for each in (quick, slow))
        with Envoy(tmp_path, free_ports(2), [a.address, b.address], 0.25, ejected_seconds=300.0) as envoy:
            envoy.wait_for(2)
            with Client(envoy.address, health_check=False, attempts=1) as client, Load(client, "m", rows) as load:
                load.go_on("before")
                for _ in range(1500):
                    if envoy.stats().get("outlier_detection.ejections_active"):
                        break
                    time.sleep(0.02)
                load.go_on("after")
                # What was on its way there: Envoy's threads hear of an ejection one by one, after its statistics.
                received = -1.0
                for _ in range(60):
                    before, received = received, _metric(b, "forwardpass_requests_total")
                    if received == before and not _metric(b, "forwardpass_in_flight_requests"):
                        break
                    time.sleep(0.5)
                load.go_on("ejected", CALM)
                assert _metric(b, "forwardpass_requests_total") == received
                stats = envoy.stats()
    load.report("a slow server behind Envoy", figure)
    assert stats["outlier_detection.ejections_active"] == 1, stats
    assert not load.failures, load.failures
