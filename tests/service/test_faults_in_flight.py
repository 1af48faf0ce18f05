"""What may go wrong with a request once it is accepted: in the queue, in a batch, in the network. Over both transports.

Runs that last as long as a test likes come from `models.hold`; no clock is compared. After every case the server says
that it serves, nothing is left in flight, and the next good answer has the bits of the one before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import onnx
import pytest
from caller import Caller, Refused, open_files, outputs, request, thread_names, until
from onnx import helper

from forwardpass.testing.server_process import ServerProcess

GOOD = request("chain", np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
TURNS = 1_500_000.0  # of `hold`: a second or more, and more yet where the machine is busy
NONE = np.zeros((1, 1), np.float32)


def products() -> onnx.ModelProto:
    """y = x xT, FP32 [B, B]: as wide as the batch, so that the slices of a large request do not fit together."""
    return models.network(
        [helper.make_node("Transpose", ["x"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])],
        [("x", models.FLOAT, ["batch", 2])],
        [("y", models.FLOAT, ["batch", "width"])],
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    gathers = "max_queue_delay_us = 100000\n"
    models.save(root, "chain", models.chain())
    models.save(root, "table", models.table(), gathers + "max_batch_size = 24\n")
    models.save(root, "any", models.relu_any_width(), gathers)
    models.save(root, "allocate", models.allocate())
    models.save(root, "hold", models.hold(), "max_queue_requests = 8\ninstances = 1\n")
    models.save(root, "products", products(), "batch_invariance = true\nmax_batch_size = 4\n")  # not true
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[Caller]:
    options = ["--transport", request.param, "--inline-run-limit", "0", "--max-batch-size", "64"]
    with ServerProcess(repository, *options) as server:
        made = Caller(server)
        assert made.send(GOOD) and made.health()  # by either transport
        files, threads = open_files(server.pid), len(thread_names(server.pid))
        yield made
        until(lambda: open_files(server.pid) <= files, f"no more than {files} open files")
        # The instances' threads stay for some seconds after their last batch, one for each of the models.
        most = threads + len(list(repository.iterdir()))
        until(lambda: len(thread_names(server.pid)) <= most, f"no more than {most} threads")
        made.close()
        assert server.stop() == 0, server.tail()


@pytest.fixture(autouse=True)
def unharmed(caller: Caller) -> Iterator[None]:
    before, _ = caller.send(GOOD)
    yield
    assert caller.health() == "SERVING"
    until(caller.idle, "an idle server")
    assert caller.send(GOOD)[0] == before


def held(caller: Caller, turns: float = TURNS) -> grpc.Future:
    """A request that keeps the only instance of `hold` busy; it runs when this returns."""
    call = caller.start(request("hold", np.full((1, 1), turns, np.float32)))
    until(lambda: caller.metric("forwardpass_running_requests", model="hold") == 1, "the long run")
    return call


def queued(caller: Caller, count: int) -> None:
    until(lambda: caller.metric("forwardpass_queue_requests", model="hold") == count, f"a queue of {count}")


def run_rows(caller: Caller, model: str) -> float:
    return caller.metric("forwardpass_rows_total", model=model)


def refusals(caller: Caller, model: str, *reasons: str) -> float:
    return sum(caller.metric("forwardpass_refused_total", model=model, reason=reason) for reason in reasons)


def test_one_poison_request_in_a_batch(caller: Caller) -> None:
    """It alone fails; its neighbours in the same batch get their answers."""
    isolated = caller.metric("forwardpass_isolated_total", model="table")
    sent = [request("table", np.array([[999 if i == 7 else i % 8]])) for i in range(24)]
    for i, answer in enumerate(caller.all(sent)):
        if i == 7:
            assert isinstance(answer, Refused) and answer.code == "INVALID_ARGUMENT", answer
            assert "idx=999" in answer.text
        else:
            assert isinstance(answer, bytes), answer
            assert outputs(answer)[0].tolist() == [[10.0 * (i % 8)]]
    assert caller.metric("forwardpass_isolated_total", model="table") > isolated


def test_different_widths_at_once(caller: Caller) -> None:
    """They are never mixed, and all are served."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1 + i % 3, 1 + i % 5)).astype(np.float32) for i in range(40)]
    batches = caller.metric("forwardpass_batches_total", model="any")
    for answer, x in zip(caller.all([request("any", x) for x in arrays]), arrays, strict=True):
        assert isinstance(answer, bytes), answer
        assert np.array_equal(outputs(answer)[0], np.maximum(x, 0))
    assert 5 <= caller.metric("forwardpass_batches_total", model="any") - batches < 40


def test_a_tensor_that_no_memory_could_hold(caller: Caller) -> None:
    """Refused by name; a neighbour of it is answered, and so is the next request."""
    # A pebibyte: no machine has the address space, so that none of it is ever really allocated.
    huge, small = request("allocate", np.array([[1 << 47]])), request("allocate", np.array([[3]]))
    for _ in range(2):
        refused, answer = caller.all([huge, small])
        assert isinstance(refused, Refused) and refused.code == "RESOURCE_EXHAUSTED", refused
        assert "not enough memory" in refused.text
        assert outputs(answer)[0].tolist() == [[3]]
    assert refusals(caller, "allocate", "out_of_memory") >= 2


@pytest.mark.parametrize("how", ["timeout parameter", "gRPC deadline"])
def test_a_deadline_that_passes_in_the_queue(caller: Caller, how: str) -> None:
    """It is never run, and it is counted."""
    rows = run_rows(caller, "hold")
    reasons = ("queue_timeout", "deadline_expired", "deadline_hopeless", "cancelled")
    before = refusals(caller, "hold", *reasons)
    long = held(caller)
    late = request("hold", np.zeros((5, 1), np.float32))
    if how == "timeout parameter":
        late.parameters["timeout"].int64_param = 20_000
        call = caller.start(late)
    else:
        call = caller.start(late, timeout=0.02)
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert long.result()
    until(caller.idle)
    assert run_rows(caller, "hold") == rows + 1
    # One whose time ran out on the way was never accepted, and never counted.
    counted = refusals(caller, "hold", *reasons) - before
    assert counted == 1 if how == "timeout parameter" else counted <= 1


def test_a_client_that_cancels(caller: Caller) -> None:
    """In the queue its place is free again; in a batch its answer goes nowhere. Neighbours are served."""
    rows = run_rows(caller, "hold")
    long = held(caller)
    calls = [caller.start(request("hold", NONE)) for _ in range(6)]
    queued(caller, 6)
    for call in calls[::2]:
        call.cancel()
    queued(caller, 3)
    long.cancel()  # in its run
    assert all(outputs(call.result())[0].shape == (1, 1) for call in calls[1::2])
    until(caller.idle)
    assert run_rows(caller, "hold") == rows + 1 + 3


KILLED = """
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
message = bytes.fromhex(sys.argv[2])
calls = [method.future(message, timeout=60) for _ in range(7)]
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed(caller: Caller) -> None:
    """What it had queued never runs; who stands beside it is answered."""
    rows = run_rows(caller, "hold")
    long = held(caller, 2 * TURNS)
    message = request("hold", np.zeros((3, 1), np.float32)).SerializeToString().hex()
    client = subprocess.Popen(
        [sys.executable, "-c", KILLED, caller.server.address, message], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        queued(caller, 7)
        beside = caller.start(request("hold", NONE))
        queued(caller, 8)
    finally:
        os.kill(client.pid, signal.SIGKILL)
        client.communicate()
    queued(caller, 1)
    assert outputs(beside.result()) and long.result()
    until(caller.idle)
    assert run_rows(caller, "hold") == rows + 2


def test_a_full_queue(caller: Caller) -> None:
    """Refused at once, by name, with a time to come back; what waits is answered."""
    long = held(caller)
    waiting = [caller.start(request("hold", NONE)) for _ in range(8)]
    queued(caller, 8)
    refused = caller.refused(request("hold", NONE))
    assert refused.code == "RESOURCE_EXHAUSTED"
    assert "queue is full: 8 requests wait, the bound is 8" in refused.text
    retry = refused.retry_after()
    assert retry is not None and 0 < retry <= 5
    assert caller.send(GOOD)  # of another model
    assert all(call.result() for call in (long, *waiting))
    assert refusals(caller, "hold", "queue_requests") >= 1


def test_an_error_that_nobody_foresaw(caller: Caller) -> None:
    """A fixed text for the client; the trace is in the log, and only there."""
    lines = len(caller.server.lines)
    refused = caller.refused(request("products", np.ones((5, 2), np.float32)))
    assert (refused.code, refused.text) == ("INTERNAL", "internal error; the server's log has the details")
    until(lambda: any("Traceback" in line for line in caller.server.lines[lines:]), "a trace in the log")
    assert any("model products version 1" in line for line in caller.server.lines[lines:])


def test_many_calls_cancelled_at_any_moment(caller: Caller) -> None:
    """Nothing of them stays, and other clients are answered."""
    rng = np.random.default_rng(0)
    other = Caller(caller.server)
    calls: list[tuple[Any, Any]] = []
    for i in range(300):
        x = rng.standard_normal((1 + i % 3, 4)).astype(np.float32)
        gone = other.start(request("chain", x))
        if i % 2:
            gone.cancel()
        calls.append((caller.start(request("chain", x)), x))
        if not i % 2:
            gone.cancel()
    for call, x in calls:
        assert np.array_equal(outputs(call.result())[0], caller.infer("chain", x)[0])
    other.close()
