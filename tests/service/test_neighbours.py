"""A slow model and a fast one on one server: the slow one's queue fills, and nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from forwardpass import Client
from forwardpass.client.errors import ResourceExhausted

SLOW_LAYERS = 12
SLOW_WIDTH = 1536


def _mlp(path: Path, width: int, layers: int) -> None:
    """x [B, width] through `layers` square layers with ReLU: 2·width²·layers FLOP a row."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal((width, width)) / width).astype(np.float32), f"W{i}")
        for i in range(layers)
    ]
    nodes = []
    last = "x"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [last, f"W{i}"], [f"z{i}"]))
        last = "y" if i == layers - 1 else f"a{i}"
        nodes.append(helper.make_node("Relu", [f"z{i}"], [last]))
    tensor = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "mlp", tensor[:1], tensor[1:], weights)
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    _mlp(tmp_path / "slow" / "1" / "model.onnx", SLOW_WIDTH, SLOW_LAYERS)
    (tmp_path / "slow" / "model.toml").write_text("max_batch_size = 2\nmax_queue_requests = 4\ninstances = 1\n")
    _mlp(tmp_path / "fast" / "1" / "model.onnx", 16, 2)
    return tmp_path


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_slow_model_starves_no_other(repository: Path, transport: str, serve: Callable[..., Any]) -> None:
    """While the slow model is overrun and refuses by name, every call of the fast one is answered, between its runs."""
    server = serve(repository, "--transport", transport)
    with Client(server.address) as client:
        row = np.ones((1, SLOW_WIDTH), np.float32)
        over = threading.Event()
        refusals: list[str] = []
        answered = [0]
        lock = threading.Lock()

        def overrun() -> None:
            while not over.is_set():
                try:
                    client.predict("slow", row, timeout=60)
                    with lock:
                        answered[0] += 1
                except ResourceExhausted as error:
                    with lock:
                        refusals.append(str(error))

        threads = [threading.Thread(target=overrun) for _ in range(12)]
        for thread in threads:
            thread.start()
        try:
            quick = np.ones((1, 16), np.float32)
            expected = client.predict("fast", quick)
            before = answered[0]
            for _ in range(300):
                assert np.array_equal(client.predict("fast", quick, timeout=60), expected)
            during = answered[0] - before
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert refusals, "the slow model was never full"
        assert all("queue is full: 4 requests wait, the bound is 4" in text for text in refusals)
        # Were the fast model behind the slow one's queue, each of its 300 calls would wait for a slow run of its own,
        # which answers two.
        assert during < 2 * 300, f"{during} slow answers during 300 fast ones"
