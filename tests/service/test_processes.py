"""Several processes behind one port are one server to everybody; one that dies, hangs or is renewed harms no other."""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from caller import INFER, Caller, Refused, files, outputs, request, until, workers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_stopping_a_load import slow_to_open

from forwardpass import Client, protocol
from forwardpass.errors import ForwardpassError
from forwardpass.testing.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
TWO = ("--processes", "2")
ROW = np.arange(4, dtype=np.float32)[None]


@pytest.fixture
def callers() -> Iterator[Callable[[ServerProcess, int], list[Caller]]]:
    """`callers(server, n)`: n connections, each of which has been used."""
    with ExitStack() as stack:

        def make(server: ServerProcess, count: int) -> list[Caller]:
            made = [Caller(server) for _ in range(count)]
            for caller in made:
                stack.callback(caller.close)
                caller.health()
            return made

        yield make


def connections(server: ServerProcess) -> list[int]:
    """How many connections to the gRPC port each process has, fewest first."""
    port = f"{int(server.address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[1].endswith(f":{port}") and row[3] == "01"}
    return sorted(
        sum(file.removeprefix("socket:[").rstrip("]") in inodes for file in files(pid)) for pid in workers(server)
    )


def children(server: ServerProcess) -> list[int]:
    """The processes of a server, without the one that accepts connections."""
    return [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]


def ask(caller: Caller, method: str, **fields: Any) -> Any:
    what = protocol.METHODS[method]
    answer, _ = caller.send(what.request(**fields), path=what.path)
    return what.response.FromString(answer)


def answers(callers: list[Caller], model: str = "m") -> list[bytes]:
    return [caller.infer(model, ROW)[0].tobytes() for caller in callers]


@contextmanager
def load(server: ServerProcess, right: set[bytes], count: int = 4) -> Iterator[Counter[str]]:
    """Clients that call all the time and count what they get: ok, wrong, or a status."""
    found: Counter[str] = Counter()
    over = threading.Event()

    def call() -> None:
        caller = Caller(server)
        while not over.is_set():
            try:
                found["ok" if caller.infer("m", ROW)[0].tobytes() in right else "wrong"] += 1
            except Refused as error:
                found[str(error)] += 1
        caller.close()

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: found["ok"] > 20 * count, "answers")
        yield found
        before = found["ok"]
        until(lambda: found["ok"] > before + 20 * count, "answers afterwards")
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_connections_are_spread_and_everything_is_counted_once(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    clients = callers(server, 8)
    assert connections(server) == [4, 4]
    assert len(set(answers(clients))) == 1
    for _ in range(4):
        answers(clients)
    for client in clients[:2]:
        (found,) = ask(client, "ModelStatistics", name="m").model_stats
        assert (found.inference_count, found.inference_stats.success.count) == (40, 40)
        assert sum(entry.compute_infer.count for entry in found.batch_stats) == found.execution_count
    assert clients[0].metric("forwardpass_requests_total", model="m", code="OK") == 40
    assert clients[0].metric("forwardpass_stage_seconds_count", model="m", stage="total") == 40
    assert clients[0].metric("forwardpass_in_flight_requests_max") == 16384
    assert clients[0].metric("forwardpass_processes", state="ready") == 2
    assert clients[0].metric("forwardpass_ready") == 1
    assert {client.health("m") for client in clients} == {"SERVING"}
    assert server.stop() == 0, server.tail()


@pytest.mark.slow  # a scrape waits for two seconds
def test_counts_of_a_report_that_nobody_waited_for_come_with_the_next(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    clients, pids = callers(server, 4), workers(server)
    answers(clients)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    clients[0].metric("forwardpass_ready")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    until(lambda: clients[0].metric("forwardpass_requests_total", model="m", code="OK") == 4, "the counts", 10.0)
    (found,) = ask(clients[0], "ModelStatistics", name="m").model_stats
    assert found.inference_count == 4


@pytest.mark.slow
def test_connections_that_ended_are_made_up_for(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    clients = callers(server, 6)
    gone = [client for client in clients if client is clients[0] or client is clients[2] or client is clients[4]]
    for client in gone:  # every second one: all of one process
        client.close()
    staying = [client for client in clients if client not in gone]
    until(lambda: sum(connections(server)) == 3, "the end of connections")

    def spread() -> bool:
        answers(staying)  # whoever was asked to connect anew does so at its next call
        return connections(server) == [1, 2]

    until(spread, "an even spread")


def test_models_come_and_go_in_all_processes_or_in_none(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO, "--model-control", "explicit")
    clients = callers(server, 4)
    assert {client.refused(request("m", ROW)).code for client in clients} == {"NOT_FOUND"}
    ask(clients[0], "RepositoryModelLoad", model_name="m")
    (first,) = set(answers(clients))
    models.save(tmp_path, "m", models.chain(seed=5), version=2)
    ask(clients[1], "RepositoryModelLoad", model_name="m")
    (second,) = set(answers(clients))
    assert second != first
    (tmp_path / "m" / "3").mkdir()
    (tmp_path / "m" / "3" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(Refused, match=r"FAILED_PRECONDITION.*version 3"):
        ask(clients[2], "RepositoryModelLoad", model_name="m")
    assert set(answers(clients)) == {second}
    index = {(m.version, m.state) for m in ask(clients[3], "RepositoryIndex").models}
    assert index == {("2", "READY"), ("3", "UNAVAILABLE")}
    shutil.rmtree(tmp_path / "m" / "3")
    ask(clients[0], "RepositoryModelUnload", model_name="m")
    assert {client.refused(request("m", ROW)).code for client in clients} == {"NOT_FOUND"}
    with pytest.raises(Refused, match="NOT_FOUND"):
        ask(clients[0], "RepositoryModelLoad", model_name="nowhere")


@pytest.mark.slow
def test_what_was_asked_for_holds_in_processes_that_come_later(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.chain())
    models.save(tmp_path, "other", models.chain())
    server = serve(tmp_path, *TWO, "--model-control", "explicit", "--load-model", "other", "--shared-memory", "on")
    (client,) = callers(server, 1)
    ask(client, "RepositoryModelLoad", model_name="m")
    ask(client, "RepositoryModelUnload", model_name="other")
    level = protocol.message("inference.LogSettingsRequest")()
    level.settings["log_info"].bool_param = False
    client.send(level, path=protocol.METHODS["LogSettings"].path)
    key = f"/forwardpass-processes-{os.getpid()}"
    path = Path("/dev/shm") / key[1:]
    path.write_bytes(bytes(4096))
    try:
        ask(client, "SystemSharedMemoryRegister", name="region", key=key, byte_size=4096)
        with pytest.raises(Refused, match="ALREADY_EXISTS"):
            ask(client, "SystemSharedMemoryRegister", name="region", key=key, byte_size=4096)
        before = set(workers(server))
        server.send(signal.SIGHUP)
        until(lambda: server.tail().count(": replaced") == 2, "new processes")
        until(lambda: before.isdisjoint(workers(server)), "the end of the old ones")
        clients = callers(server, 2)
        assert connections(server) == [1, 1] or sum(connections(server)) == 3
        for caller in clients:
            assert caller.infer("m", ROW)
            assert caller.refused(request("other", ROW)).code == "NOT_FOUND"
            assert [*ask(caller, "SystemSharedMemoryStatus").regions] == ["region"]
            found, _ = caller.send(
                protocol.message("inference.LogSettingsRequest")(), path=protocol.METHODS["LogSettings"].path
            )
            assert (
                not protocol.message("inference.LogSettingsResponse").FromString(found).settings["log_info"].bool_param
            )
        ask(clients[0], "SystemSharedMemoryUnregister", name="region")
        assert not ask(clients[1], "SystemSharedMemoryStatus").regions
    finally:
        path.unlink()


@pytest.mark.slow
def test_what_was_served_is_served_by_processes_that_come_later(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    for name in ("first", "m"):
        models.save(tmp_path, name, models.chain())
    server = serve(tmp_path, *TWO, "--model-control", "explicit", "--load-model", "first")
    (client,) = callers(server, 1)
    ask(client, "RepositoryModelLoad", model_name="m")
    load = protocol.METHODS["RepositoryModelLoad"]
    broken = load.request(model_name="m")
    broken.parameters["config"].string_param = "{}"
    broken.parameters["file:1/model.onnx"].bytes_param = b"nonsense"
    assert client.refused(broken, path=load.path).code == "FAILED_PRECONDITION"
    assert client.infer("m", ROW)
    os.kill(workers(server)[0], signal.SIGKILL)
    until(lambda: any("replaced in" in line for line in server.lines), "another process")
    clients = callers(server, 4)
    for name in ("first", "m"):
        assert len(set(answers(clients, name))) == 1


def test_a_model_that_is_served_with_a_reservation_is_no_failure(
    tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]
) -> None:
    models.save(tmp_path, "m", models.centred(), "max_batch_size = 8\n")
    server = serve(tmp_path, *TWO, "--model-control", "explicit")
    clients = callers(server, 2)
    ask(clients[0], "RepositoryModelLoad", model_name="m")
    for client in clients:
        (entry,) = ask(client, "RepositoryIndex").models
        assert entry.state == "READY"
        assert entry.reason.startswith("served one request at a time")


@pytest.mark.slow  # a network that takes its time to be opened
def test_what_is_asked_for_while_a_process_starts_holds_in_it(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    models.save(tmp_path, "slow", slow_to_open(100))
    server = serve(tmp_path, *TWO, "--model-control", "explicit", "--shared-memory", "on")
    (client, other) = (Caller(server) for _ in range(2))
    ask(client, "RepositoryModelLoad", model_name="slow")
    key = f"/forwardpass-starting-{os.getpid()}"
    path = Path("/dev/shm") / key[1:]
    path.write_bytes(bytes(4096))
    try:
        ask(client, "SystemSharedMemoryRegister", name="before", key=key, byte_size=4096)
        for pid in workers(server)[:1]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(workers(server)) == 2, "a process that loads")
        client.close()
        client = Caller(server)
        ask(client, "RepositoryModelLoad", model_name="m")
        ask(client, "SystemSharedMemoryRegister", name="meanwhile", key=key, byte_size=4096)
        ask(client, "SystemSharedMemoryUnregister", name="before")
        assert not any("replaced in" in line for line in server.lines)
        until(lambda: any("replaced in" in line for line in server.lines), "another process")
        callers = [Caller(server) for _ in range(4)]
        assert len(set(answers(callers))) == 1
        assert [[*ask(c, "SystemSharedMemoryStatus").regions] for c in callers] == [["meanwhile"]] * 4
        for caller in (client, other, *callers):
            caller.close()
    finally:
        path.unlink()


def test_a_changed_folder_is_served_by_all(tmp_path: Path, serve: Serve, callers: Callable[..., list[Caller]]) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO, "--model-control", "poll", "--poll-seconds", "0.2")
    clients = callers(server, 4)
    (before,) = set(answers(clients))
    models.save(tmp_path, "m", models.chain(seed=3), version=2)
    until(lambda: len(now := set(answers(clients))) == 1 and now != {before}, "the new version")
    (tmp_path / "m").rename(tmp_path / ".m")
    until(lambda: all(len(ask(client, "RepositoryIndex").models) == 0 for client in clients), "the end of it")


def test_a_killed_process_is_replaced_and_only_its_calls_fail(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO, "--health-port", "0")
    caller = Caller(server)
    right = {caller.infer("m", ROW)[0].tobytes()}
    with load(server, right) as found:
        for times in (1, 2):
            counted = caller.metric("forwardpass_requests_total", code="OK")
            seconds = caller.metric("process_cpu_seconds_total")
            victim = workers(server)[0]
            os.kill(victim, signal.SIGKILL)
            until(lambda n=times: sum("replaced in" in line for line in server.lines) == n, "another process")  # type: ignore[misc]
            assert caller.metric("forwardpass_requests_total", code="OK") >= counted
            assert caller.metric("process_cpu_seconds_total") >= seconds
            assert caller.metric("forwardpass_process_ends_total", cause="SIGKILL") == times
    failed = {what: count for what, count in found.items() if what != "ok"}
    assert all(what.startswith("UNAVAILABLE") for what in failed), failed
    assert sum(failed.values()) <= 8, failed  # of 4 clients one call each, at most, is under way on the killed one
    caller.close()
    assert server.stop() == 0, server.tail()


@pytest.mark.slow
def test_our_clients_retries_make_up_for_a_killed_process(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    over, count, failed = threading.Event(), Counter[int](), list[str]()

    def call(number: int) -> None:
        with Client(server.address) as client:
            while not over.is_set():
                try:
                    client.infer("m", {"x": ROW}, timeout=30.0)
                    count[number] += 1
                except ForwardpassError as error:
                    failed.append(str(error))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: min(count[n] for n in range(4)) > 20, "answers")
    os.kill(workers(server)[0], signal.SIGKILL)
    until(lambda: any("replaced in" in line for line in server.lines), "another process")
    before = count.copy()
    until(lambda: all(count[n] > before[n] + 20 for n in range(4)), "answers afterwards")
    over.set()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.slow
def test_readiness_follows_the_number_of_processes(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO, "--min-processes", "2", "--health-port", "0")
    (line,) = [line for line in server.lines if line.startswith("health ")]
    said: list[int] = []
    with grpc.insecure_channel(line.split()[1]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        def listen() -> None:
            with suppress(grpc.RpcError):
                for response in watch:
                    said.append(response.status)  # noqa: PERF401

        thread = threading.Thread(target=listen)
        thread.start()
        until(lambda: said == [1], "SERVING")
        os.kill(workers(server)[1], signal.SIGKILL)
        until(lambda: said == [1, 2, 1], "NOT_SERVING, then SERVING")
        server.send(signal.SIGTERM)
        thread.join()
    assert said == [1, 2, 1, 2]
    assert server.wait() == 0


@pytest.mark.slow
def test_renewal_fails_no_call_and_a_broken_repository_ends_it(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    caller = Caller(server)
    right = {caller.infer("m", ROW)[0].tobytes()}
    models.save(tmp_path, "m", models.chain(seed=3), version=2)  # read when it is renewed
    with ServerProcess(tmp_path, "--max-batch-size", "64") as alone:
        other = Caller(alone)
        right.add(other.infer("m", ROW)[0].tobytes())
        other.close()
    with load(server, right) as found:
        server.send(signal.SIGHUP)
        until(lambda: server.tail().count(": replaced") == 2, "new processes")
        (tmp_path / "m" / "2" / "model.onnx").write_bytes(b"nonsense")
        server.send(signal.SIGHUP)
        until(lambda: "NOT replaced, the old one goes on" in server.tail(), "that it is not renewed")
    assert {*found} == {"ok"}, found
    assert caller.health() == "SERVING"
    caller.close()
    assert server.stop() == 0, server.tail()


@pytest.mark.slow  # more connections than fit in what lies between two processes
def test_connections_wait_for_processes_that_are_busy(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    host, _, port = server.address.rpartition(":")
    pids = workers(server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    made = [socket.create_connection((host, int(port))) for _ in range(1700)]
    until(lambda: sum(file.startswith("socket:") for file in files(server.pid)) > 1300, "that all are accepted")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for connection in made:
        with connection:
            connection.settimeout(30.0)
            assert len(connection.recv(9)) == 9  # SETTINGS, with which a server begins
    assert "closed" not in server.tail()
    assert server.stop() == 0, server.tail()


@pytest.mark.slow
def test_a_process_that_dies_while_it_is_renewed_leaves_none_behind(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    until(lambda: len(children(server)) == 3, "the process that waits")
    old, before = workers(server), {*children(server)}
    server.send(signal.SIGHUP)
    until(lambda: not {*children(server)} <= before, "the first new one")
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    until(lambda: sum(line.endswith(": replaced") for line in server.lines) == 2, "new processes")
    until(lambda: len(children(server)) == 3 and len(workers(server)) == 2, "the end of all others")
    assert server.stop() == 0, server.tail()


@pytest.mark.slow
def test_a_process_that_cannot_be_started_is_started_later(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    until(lambda: len(children(server)) == 3, "the process that waits")
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, hard))
    for pid in workers(server):  # the process that waits takes the place of one of them
        os.kill(pid, signal.SIGKILL)
    until(lambda: "no process can be started: Too many open files" in server.tail(), "that there are no descriptors")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: len(workers(server)) == 2, "both processes")


@pytest.mark.slow
def test_a_stop_starts_no_process_that_was_to_be_started_later(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    models.save(tmp_path, "hold", models.hold())
    server = serve(tmp_path, *TWO, "--grace", "60")  # longer than `stop` waits
    clients = [Caller(server) for _ in range(2)]
    for client in clients:
        client.health()
    calls = [client.start(request("hold", np.array([[6_000_000.0]], np.float32))) for client in clients]
    until(lambda: clients[0].metric("forwardpass_in_flight_requests") == 2, "calls in flight")
    staying = workers(server)[0]
    for times in (1, 2, 3):  # after the third time the next one starts in 1 s
        (victim,) = (pid for pid in workers(server) if pid != staying)
        os.kill(victim, signal.SIGKILL)
        until(lambda n=times: server.tail().count("ended by SIGKILL") == n, "its end")  # type: ignore[misc]
        if times < 3:
            until(lambda n=times: server.tail().count("replaced in") == n, "another process")  # type: ignore[misc]
    assert server.stop() == 0, server.tail()
    assert sum(call.exception() is None for call in calls) == 1


def test_the_end_answers_what_is_in_flight_and_leaves_no_process(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "hold", models.hold(), "instances = 3\n")
    server = serve(tmp_path, *TWO)
    pids = children(server)
    clients = [Caller(server) for _ in range(4)]
    calls = [client.start(request("hold", np.array([[300_000.0]], np.float32))) for client in clients]
    until(lambda: clients[0].metric("forwardpass_in_flight_requests") == 4, "calls in flight")
    server.send(signal.SIGTERM)
    for call in calls:
        assert outputs(call.result())
    assert server.wait() == 0, server.tail()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_the_end_does_not_wait_for_a_load_that_cannot_be_interrupted(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "slow", slow_to_open())
    server = serve(tmp_path, *TWO, "--model-control", "explicit", "--grace", "60")  # longer than `stop` waits
    caller = Caller(server)
    load = protocol.METHODS["RepositoryModelLoad"]
    call = caller.channel.unary_unary(load.path).future(load.request(model_name="slow").SerializeToString())
    until(lambda: "LOADING" in {entry.state for entry in ask(caller, "RepositoryIndex").models}, "the load")
    time.sleep(0.5)  # it is in ONNX Runtime
    assert server.stop() == 0, server.tail()
    assert call.exception() is not None
    caller.close()


@pytest.mark.slow
def test_processes_end_when_the_supervisor_is_killed(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    pids = children(server)
    assert len(pids) >= 2
    server.kill()

    def ended(pid: int) -> bool:
        try:  # an orphan may stay a zombie where nobody waits for it
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    until(lambda: all(map(ended, pids)), "the end of all processes")


@pytest.mark.slow  # a process counts as hanging only after the longest run and ten seconds
def test_a_process_that_hangs_is_replaced(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO, "--run-timeout", "1")
    caller = Caller(server)
    os.kill(workers(server)[0], signal.SIGSTOP)
    until(lambda: any("replaced in" in line for line in server.lines), "another process", 120.0)
    assert caller.metric("forwardpass_process_ends_total", cause="hung") == 1
    caller.close()


@pytest.mark.slow  # longer than a process may hang
def test_nobody_hangs_where_all_stood_still(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, "--processes", "4", "--run-timeout", "1")
    before = workers(server)
    pids = [*before, server.pid]
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)  # each owes a report
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(12.0)  # as where a container is paused
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    caller = Caller(server)
    for _ in range(3):  # each takes the reports of all
        assert caller.metric("forwardpass_process_ends_total", cause="hung") == 0
        time.sleep(1.0)
    assert workers(server) == before
    caller.close()


@pytest.mark.slow
def test_a_failed_model_is_one_models_misfortune(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    models.save(tmp_path, "bad", models.chain())
    (tmp_path / "bad" / "1" / "model.onnx").write_bytes(b"nonsense")
    server = serve(tmp_path, *TWO)
    caller = Caller(server)
    assert caller.infer("m", ROW)
    assert caller.refused(request("bad", ROW)).code == "FAILED_PRECONDITION"
    assert caller.metric("forwardpass_model_state", model="bad", state="failed") == 1
    assert caller.metric("forwardpass_model_load_failures_total", model="bad") == 1
    caller.close()


@pytest.mark.slow  # a server is given time to become ready, and must not
def test_strict_holds_for_several_processes(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ForwardpassError, match=r"NOT ready: of 2 processes 0 are; missing: bad 1"):
        ServerProcess(tmp_path, *TWO, "--strict", patience=10.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--transport", "grpcio"), "processes: several need the direct transport"),
        (("--grpc-port", "TAKEN"), "cannot listen on 127.0.0.1:"),
        (("--tls-certificate", "/nowhere", "--tls-key", "/nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_served_ends_at_once(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    models.save(tmp_path, "m", models.chain())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [option.replace("TAKEN", str(taken.getsockname()[1])) for option in options]
        with pytest.raises(ForwardpassError, match=f"ended before it was ready(?s:.*){words}"):
            ServerProcess(tmp_path, *TWO, *given)


def test_a_process_that_ends_by_itself_has_its_own_status(tmp_path: Path) -> None:
    models.save(tmp_path, "m", models.chain())
    nowhere = ("--tls-certificate", "/nowhere", "--tls-key", "/nowhere")
    with pytest.raises(ForwardpassError, match=r"process \d+ ended with status 1"):
        ServerProcess(tmp_path, *TWO, *nowhere)


def test_http_and_the_status_page_show_all_processes(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    clients = [Caller(server) for _ in range(4)]
    answers(clients)

    def snapshot() -> Any:
        with urllib.request.urlopen(f"{server.http_url}/status/snapshot.json", timeout=10) as response:
            return json.load(response)

    until(lambda: [model["answered"] for model in snapshot()["models"]] == [4], "the requests of all")
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0, 1.0, 2.0, 3.0]}]})
    with urllib.request.urlopen(f"{server.http_url}/v2/models/m/infer", body.encode(), timeout=10) as response:
        found = json.load(response)["outputs"][0]["data"]
    assert np.array(found, np.float32).tobytes() == answers(clients)[0]
    for client in clients:
        client.close()


@pytest.mark.slow
def test_the_status_page_does_not_wait_for_a_process_that_hangs(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "m", models.chain())
    server = serve(tmp_path, *TWO)
    with ExitStack() as stack:
        made = [http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=20) for _ in range(2)]

        def answering(connection: http.client.HTTPConnection) -> int:
            connection.request("GET", "/status/snapshot.json")
            return int(json.load(connection.getresponse())["server"]["pid"])

        for connection in made:
            stack.callback(connection.close)
        (stopped, pid) = map(answering, made)
        assert {stopped, pid} == {*workers(server)}
        os.kill(stopped, signal.SIGSTOP)
        try:
            time.sleep(1.0)  # a younger document is given out again
            assert answering(made[1]) == pid
        finally:
            os.kill(stopped, signal.SIGCONT)


@pytest.mark.slow
def test_one_message_larger_than_a_share_is_still_served(tmp_path: Path, serve: Serve) -> None:
    models.save(tmp_path, "words", models.echo(models.STRING, ("batch", 1)))
    server = serve(tmp_path, "--processes", "3", "--max-bytes", "3000000", "--max-message-bytes", "2500000")
    caller = Caller(server)
    answer, _ = caller.send(request("words", np.array([["x" * 2_000_000]], object)), path=INFER)
    assert len(answer) > 2_000_000
    caller.close()


@pytest.mark.slow
def test_large_weights_are_in_memory_once(tmp_path: Path, serve: Serve) -> None:
    width = 1600  # 10 MB of weights in each of two layers
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.02, (width, width)).astype(np.float32) for _ in range(2)]
    nodes = [
        models.helper.make_node("Gemm", ["x", "w0"], ["h"], transB=1),
        models.helper.make_node("Relu", ["h"], ["r"]),
        models.helper.make_node("Gemm", ["r", "w1"], ["y"], transB=1),
    ]
    tensors = [(name, models.FLOAT, ("batch", width)) for name in ("x", "y")]
    network = models.network(nodes, tensors[:1], tensors[1:], {f"w{i}": w for i, w in enumerate(weights)})
    models.save(tmp_path, "wide", network)
    server = serve(tmp_path, *TWO)
    clients = [Caller(server) for _ in range(2)]
    x = rng.normal(0, 1, (1, width)).astype(np.float32)
    for client in clients:
        (found,) = client.infer("wide", x)
        np.testing.assert_allclose(found, np.maximum(x @ weights[0].T, 0) @ weights[1].T, rtol=1e-3, atol=1e-3)
        client.close()
    pids = workers(server)
    assert len(pids) == 2
    for pid in pids:
        mapped = mappings(pid, "network.weights")
        assert mapped["Rss"] >= 2 * width * width * 4  # the packed matrices
        assert mapped["Anonymous"] == 0  # all of it is the file's, which both map


@pytest.mark.slow
def test_copies_of_weights_go_with_their_versions_and_their_server(tmp_path: Path, serve: Serve) -> None:
    repository, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()

    def save(version: int) -> None:
        weights = np.random.default_rng(version).normal(0, 0.02, (1600, 1600)).astype(np.float32)
        node = models.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        tensors = [(name, models.FLOAT, ("batch", 1600)) for name in ("x", "y")]
        models.save(repository, "m", models.network([node], tensors[:1], tensors[1:], {"w": weights}), version=version)

    def copies() -> int:
        return len([*temporary.glob("forwardpass-weights-*/*/*/network.weights")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        save(1)
        server = serve(repository, *TWO, "--model-control", "explicit")
        caller = Caller(server)
        ask(caller, "RepositoryModelLoad", model_name="m")
        assert copies() == 1
        save(2)
        ask(caller, "RepositoryModelLoad", model_name="m")
        until(lambda: copies() == 1, "the end of the first version's copy")
        assert caller.infer("m", np.zeros((1, 1600), np.float32))
        ask(caller, "RepositoryModelUnload", model_name="m")
        until(lambda: copies() == 0, "the end of the second one's")
        ask(caller, "RepositoryModelLoad", model_name="m")
        caller.close()
        server.kill()
        assert copies() == 1
        assert serve(repository, *TWO, "--model-control", "explicit").stop() == 0
        assert not [*temporary.glob("forwardpass-weights-*")]


def mappings(pid: int, name: str) -> Counter[str]:
    """Bytes of what a process has mapped of files of this name, by what the kernel calls it."""
    found: Counter[str] = Counter()
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1].endswith(name)
        elif inside and words[-1] == "kB":
            found[words[0].rstrip(":")] += int(words[1]) * 1024
    return found
