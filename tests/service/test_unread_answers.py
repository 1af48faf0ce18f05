"""Answers that their clients do not read: what they hold is bounded, others are served, and memory goes back.

Every request is of 1.7 kB, and its answer of 2 MiB.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import http2_frames as http2
import models
import numpy as np
import onnx
import pytest
from caller import Caller, outputs, request, until
from onnx import helper
from raw_client import RawClient, data_frames

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

MIB = 1 << 20
WIDTH, TIMES = 416, 1261  # floats of a request, and how often its answer has them: 2 MiB
BOUND = 64 * MIB
CALLS = 300  # which have 600 MB of answers; beyond 1,000 at once gRPC's core rejects some by itself
# What a server takes for itself and for the batches that it runs, beside its bound on answers.
BESIDE = 160 * MIB
EXHAUSTED = "8"
ROW = np.arange(WIDTH, dtype=np.float32)[np.newaxis]
MODELS = ("fixed", "open")
STREAM = protocol.METHODS["ModelStreamInfer"].path


def repeated(width: int | str) -> onnx.ModelProto:
    """y = x, TIMES times side by side; its width is known, or, by a word, is not."""
    return models.network(
        [helper.make_node("Tile", ["x", "times"], ["y"])],
        [("x", models.FLOAT, ["batch", WIDTH])],
        [("y", models.FLOAT, ["batch", width])],
        {"times": np.array([1, TIMES], np.int64)},
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for name, width in zip(MODELS, (WIDTH * TIMES, "width"), strict=True):
        models.save(root, name, repeated(width), "max_batch_size = 4\nbatch_invariance = true\n")
    return root


@pytest.fixture(params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[Caller]:
    options = ("--transport", request.param, "--max-bytes", str(BOUND), "--inline-run-limit", "0")
    with ServerProcess(repository, *options) as server:
        made = Caller(server)
        for model in MODELS:
            answered(made, model)
        yield made
        until(made.idle, "an idle server")
        made.close()
        assert server.stop() == 0, server.tail()
        if request.param == "direct":  # grpcio logs what it could not send to a client that left
            assert not [line for line in server.lines if "Traceback" in line], server.tail()


def answered(caller: Caller, model: str) -> None:
    (y,) = caller.infer(model, ROW)
    assert y.tobytes() == np.tile(ROW, TIMES).tobytes()


def memory(caller: Caller, field: str) -> int:
    """Bytes of the server's memory: VmRSS, what it has; VmHWM, the most that it had."""
    status = Path(f"/proc/{caller.server.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def settled(caller: Caller) -> None:
    """Every request was answered, or is not there any more; the server has tried to send what it can."""
    until(caller.idle, "the end of all runs")


@pytest.fixture
def connect(caller: Caller) -> Iterator[Callable[[], RawClient]]:
    """Makes connections whose calls have no room for answers."""
    with contextlib.ExitStack() as stack:

        def connected() -> RawClient:
            client = RawClient(caller.server.address)
            stack.callback(client.close)
            client.greet(http2.settings(initial_window_size=0))
            return client

        yield connected


def unread(client: RawClient, model: str, calls: int = CALLS) -> RawClient:
    """Make that many calls whose answers are not read."""
    message = request(model, ROW).SerializeToString()
    for i in range(calls):
        client.send(client.call(2 * i + 1, message))
    return client


def refused(client: RawClient, calls: int) -> int:
    """Of the calls of `unread`, how many are refused for want of room, once the others' answers are let through."""
    client.send(http2.settings(initial_window_size=http2.LARGEST_WINDOW))
    client.send(http2.window_update(0, http2.LARGEST_WINDOW - http2.DEFAULT_WINDOW))
    ended: list[str] = []
    for kind, _, _, payload in client.frames():
        if kind == http2.HEADERS and "grpc-status" in payload:
            ended.append(payload["grpc-status"])
            assert payload["grpc-status"] in ("0", EXHAUSTED), payload
            if len(ended) == calls:
                break
    assert len(ended) == calls
    return ended.count(EXHAUSTED)


@pytest.mark.parametrize("model", MODELS)
def test_what_a_connection_does_not_read_is_bounded(
    caller: Caller, connect: Callable[[], RawClient], model: str
) -> None:
    before = memory(caller, "VmRSS")
    clients = [unread(connect(), model) for _ in range(3)]
    settled(caller)
    answered(caller, model)  # there is room for a neighbour
    assert memory(caller, "VmHWM") - before < BOUND + BESIDE
    count = refused(clients[0], CALLS)
    assert CALLS - BOUND // (2 * MIB) <= count < CALLS  # what fits is answered
    for client in clients:
        client.close()
    until(lambda: memory(caller, "VmRSS") - before < 48 * MIB, "memory that goes back to the system")
    answered(caller, model)


def test_what_a_stream_does_not_read_is_bounded(caller: Caller, connect: Callable[[], RawClient]) -> None:
    before = memory(caller, "VmRSS")
    client = connect()
    message = request("open", ROW).SerializeToString()
    prefixed = struct.pack(">BI", 0, len(message)) + message
    client.send(client.headers(1, STREAM), data_frames(1, prefixed * CALLS, end=False))
    until(lambda: caller.metric("forwardpass_rows_total", model="open") >= 8, "runs of the stream's requests")
    settled(caller)
    answered(caller, "open")
    assert memory(caller, "VmHWM") - before < BOUND + BESIDE
    client.close()
    until(lambda: memory(caller, "VmRSS") - before < 48 * MIB, "memory that goes back to the system")


def test_a_client_that_reads_gets_all_of_its_answers(caller: Caller) -> None:
    """As many under way as there is room for, and then as many again and again."""
    message = request("fixed", ROW)
    for _ in range(6):
        for answer in caller.all([message] * 12):
            assert outputs(answer)[0].tobytes() == np.tile(ROW, TIMES).tobytes()
