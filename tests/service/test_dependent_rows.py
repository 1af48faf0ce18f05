"""Networks whose rows depend on each other, under single rows from many threads: every answer is the network's own.

Whether the contract, the probe or nobody's word but the operator's says that they may share runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton
from caller import Caller, outputs, request, threads, until
from numpy.typing import NDArray

from forwardpass.testing.server_process import ServerProcess

MEASURES = True  # of batch sizes, at the start

THREADS, EACH = 24, 60
OPTIONS = "max_batch_size = 64\nmax_queue_delay_us = 2000\n"  # so that requests do share runs where they may
TRIMMED = ("by_contract", "by_graph", "asserted")
FAMILIES = (*TRIMMED, "experts")
Rows = dict[str, NDArray[np.generic]]


def long_rows(count: int) -> Rows:
    """Rows that are alike in what matters: all of them fill their twelve places."""
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((count, 12, 2)).astype(np.float32), "lengths": rng.integers(12, 100, count)}


def rows_of(name: str, count: int) -> Rows:
    rng = np.random.default_rng(2)
    if name in TRIMMED:
        return {"x": rng.standard_normal((count, 12, 2)).astype(np.float32), "lengths": rng.integers(1, 13, count)}
    return {"x": np.abs(rng.standard_normal((count, 2))).astype(np.float32)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dependent")
    for name, verdict, more in (
        ("by_contract", False, ""),
        ("by_graph", None, ""),  # its exporter measured nothing, and its samples are all alike
        ("asserted", False, "batch_invariance = true\n"),
    ):
        models.add_contract(models.save(root, name, models.trimmed(), OPTIONS + more), long_rows(8), verdict)
    models.save(root, "experts", models.capacity(), OPTIONS)
    return root


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def caller(request: pytest.FixtureRequest, repository: Path) -> Iterator[Caller]:
    with ServerProcess(repository, "--transport", request.param) as server:
        made = Caller(server)
        yield made
        until(made.idle)
        made.close()
        assert server.stop() == 0, server.tail()


def wrong(caller: Caller, repository: Path, name: str) -> int:
    """How many of the answers to single rows from THREADS threads are not the network's alone."""
    session = onnxruntime.InferenceSession(str(repository / name / "1/model.onnx"), providers=["CPUExecutionProvider"])
    rows = rows_of(name, THREADS * EACH)
    off = np.zeros(THREADS * EACH, bool)

    def work(thread: int) -> None:
        for i in range(thread * EACH, (thread + 1) * EACH):
            one = {key: array[i : i + 1] for key, array in rows.items()}
            answer, _ = caller.send(request(name, *one.values(), names=tuple(one)))
            off[i] = not np.allclose(outputs(answer)[0], session.run(None, one)[0], rtol=1e-5, atol=1e-6)

    with threads(THREADS, work):
        pass
    return int(off.sum())


@pytest.mark.parametrize("name", ["by_contract", "by_graph", "experts"])
def test_no_answer_depends_on_the_neighbours(caller: Caller, repository: Path, name: str) -> None:
    assert wrong(caller, repository, name) == 0
    assert caller.metric("forwardpass_model_info", model=name, batch_invariance="dependent") == 1


def test_an_operator_may_overrule_the_contract(caller: Caller, repository: Path) -> None:
    """And gets what was asked for, which also shows that requests would share runs here."""
    assert wrong(caller, repository, "asserted") > 0
    assert caller.metric("forwardpass_model_info", model="asserted", batch_invariance="asserted") == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("by_contract", "served one request at a time: rows_independent = false in its contract"),
        ("by_graph", "served one request at a time: a node of ReduceMax reduces axis 0, along which the rows lie"),
        ("experts", "served one request at a time: a node of CumSum works along axis 0, along which the rows lie"),
        ("asserted", "answers may depend on the requests that share a run: batch_invariance = true in the model's "
                     "options, not probed, against rows_independent = false in its contract"),
    ],
)  # fmt: skip
def test_log_index_and_config_say_why(caller: Caller, name: str, why: str) -> None:
    assert any("WARNING" in line and f"model {name} version 1: {why}" in line for line in caller.server.lines)
    with triton.InferenceServerClient(caller.server.address) as client:
        (entry,) = [model for model in client.get_model_repository_index().models if model.name == name]
        assert entry.state == "READY" and entry.reason.startswith(why)
        assert client.get_model_config(name).config.parameters["batch_invariance"].string_value == entry.reason
