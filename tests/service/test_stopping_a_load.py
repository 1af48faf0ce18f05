"""SIGTERM while a model is opened, measured, probed or warmed: the server ends within its grace, with a line and 0.

And what only reads is answered while a model loads.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import onnx
import pytest
from caller import Caller, outputs, request, until
from onnx import helper, numpy_helper
from test_lifecycle import starting

from forwardpass import protocol
from forwardpass.testing.server_process import ServerProcess

MEASURES = True  # of batch sizes, at the start

Serve = Callable[..., ServerProcess]

FOR_EVER = 10**15  # turns of `hold`'s loop
SOME = 2_000_000  # about a second of turns


def holding(turns: int) -> onnx.ModelProto:
    """`hold` whose every run takes as many turns, whatever x is."""
    model = models.hold()
    for node in model.graph.node:
        if node.op_type == "Loop":
            node.input[0] = "fixed"
    model.graph.initializer.append(numpy_helper.from_array(np.array(turns), "fixed"))
    return model


def slow_to_open(products: int = 400) -> onnx.ModelProto:
    """y = x·c with c = a chain of products that ONNX Runtime folds as it opens the network: many seconds of them."""
    size = 1500
    nodes = []
    last = "w"
    for i in range(products):
        nodes += [
            helper.make_node("MatMul", [last, "w"], [f"product{i}"]),
            helper.make_node("Softmax", [f"product{i}"], [f"bounded{i}"]),
        ]
        last = f"bounded{i}"
    nodes.append(helper.make_node("MatMul", ["x", last], ["y"]))
    weights = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return models.network(
        nodes, [("x", models.FLOAT, ["batch", size])], [("y", models.FLOAT, ["batch", size])], {"w": weights}
    )


WARM_UP = """
[[warm_up]]
name = "many"
count = 1000
inputs.x = { datatype = "FP32", dims = [1], data = "zero" }
"""

# What a load is doing when the signal comes: the network, its options.
STAGES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "opening": (slow_to_open, ""),
    "measuring": (lambda: holding(FOR_EVER), ""),
    "probing": (lambda: holding(FOR_EVER), "max_batch_size = 8\n"),
    "warming up": (lambda: holding(FOR_EVER), "max_batch_size = 8\nbatch_invariance = true\n"),
    "warm-up requests": (lambda: holding(SOME), "max_batch_size = 1\nbatch_invariance = true\n" + WARM_UP),
}


def states(server: Any) -> dict[str, str]:
    """Model -> state, as RepositoryIndex has it. It must answer within seconds, whatever loads."""
    index = protocol.METHODS["RepositoryIndex"]
    with grpc.insecure_channel(server.address) as channel:
        answer = channel.unary_unary(index.path)(b"", timeout=10, wait_for_ready=True)
    return {m.name: m.state for m in index.response.FromString(answer).models}


def ended(process: subprocess.Popen[str]) -> int:
    """The exit status of a server that was told to stop; its grace is 2 s, and the rest is for a busy machine."""
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        raise AssertionError("the server lives 30 s after the signal") from None


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_while_a_model_loads_at_the_start(tmp_path: Path, stage: str) -> None:
    made, options = STAGES[stage]
    models.save(tmp_path, "slow", made(), options)
    with starting(tmp_path, "--grace", "2") as server:
        assert states(server) == {"slow": "LOADING"}
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("^stopped$")
        assert ended(server.process) == 0, server.seen
        assert not [line for line in server.seen if "Traceback" in line or "ERROR" in line]


@pytest.mark.parametrize("stage", ["opening", "measuring"])
def test_a_second_signal_does_not_abort(tmp_path: Path, stage: str) -> None:
    made, options = STAGES[stage]
    models.save(tmp_path, "slow", made(), options)
    with starting(tmp_path, "--grace", "600") as server:
        assert states(server) == {"slow": "LOADING"}
        server.process.send_signal(signal.SIGINT)
        server.wait_for("^draining")
        server.process.send_signal(signal.SIGINT)
        assert ended(server.process) == 0, server.seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_during_a_load_by_request(tmp_path: Path, serve: Serve, stage: str) -> None:
    made, options = STAGES[stage]
    models.save(tmp_path, "quick", models.chain())
    models.save(tmp_path, "slow", made(), options)
    server = serve(tmp_path, "--model-control", "explicit", "--load-model", "quick", "--grace", "2")
    caller = Caller(server)
    load = protocol.METHODS["RepositoryModelLoad"]
    call = caller.channel.unary_unary(load.path).future(load.request(model_name="slow").SerializeToString(), timeout=90)
    until(lambda: states(server) == {"quick": "READY", "slow": "LOADING"}, "the load")
    assert caller.health() == caller.health("quick") == "SERVING"
    assert outputs(caller.send(request("quick", np.ones((1, 4), np.float32)))[0])
    server.send(signal.SIGTERM)
    assert call.code().name == "UNAVAILABLE" and "stopping" in call.details()
    assert server.wait() == 0 and server.lines[-1] == "stopped"
    assert not [line for line in server.lines if "Traceback" in line or "ERROR" in line]
    caller.close()


def test_a_step_that_cannot_be_interrupted_is_left_behind(tmp_path: Path) -> None:
    models.save(tmp_path, "slow", models.chain(), 'labels = "labels.txt"\n')
    os.mkfifo(tmp_path / "slow" / "labels.txt")
    with starting(tmp_path, "--grace", "1") as server:
        writer = os.open(tmp_path / "slow" / "labels.txt", os.O_WRONLY)  # returns once the server reads, for ever
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("in a step that cannot be interrupted; the process ends without it$")
        server.wait_for("^stopped$")
        assert ended(server.process) == 0, server.seen
        os.close(writer)
