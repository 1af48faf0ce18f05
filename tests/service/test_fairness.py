"""Clients that share a model's queue, over real channels: nobody is served after those who came later.

And large requests leave room for small ones: all are answered, the small ones between the turns of the large."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest
from caller import Caller, outputs, request, threads, until

from forwardpass.testing.server_process import ServerProcess

BLOCKS, SHORT = 1e6, 2e3  # turns of `hold`


def hold(turns: float) -> Any:
    return request("hold", np.array([[turns]], np.float32))


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_far_deadline_is_served_in_its_turn(tmp_path: Path, transport: str) -> None:
    models.save(tmp_path, "hold", models.hold(), "max_batch_size = 1\ninstances = 1\n")
    with ServerProcess(tmp_path, "--transport", transport) as server:
        caller = Caller(server)
        blocks = caller.start(hold(BLOCKS), timeout=None)
        until(lambda: caller.metric("forwardpass_running_requests", model="hold") == 1, "the run")
        before = [caller.start(hold(SHORT), timeout=None) for _ in range(20)]
        until(lambda: caller.metric("forwardpass_queue_requests", model="hold") == 20, "the queue")
        dated = caller.start(hold(SHORT), timeout=300.0)
        until(lambda: caller.metric("forwardpass_queue_requests", model="hold") == 21, "the dated request")
        after = [caller.start(hold(SHORT), timeout=None) for _ in range(20)]
        seen: list[int] = []
        dated.add_done_callback(lambda _: seen.append(sum(call.done() for call in after)))
        for call in (blocks, *before, dated, *after):
            call.result()
        until(lambda: bool(seen), "the callback")
        assert seen[0] < 10, "those who came after it were served before it"
        caller.close()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_bulk_clients_and_single_rows_are_all_answered(tmp_path: Path, transport: str) -> None:
    network = models.chain((64, 512, 512, 10))
    models.save(tmp_path, "chain", network, "max_batch_size = 64\nmax_queue_rows = 512\nmax_request_rows = 20000\n")
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((20000, 64)).astype(np.float32)
    sizes = (20000, 4096, 4096, 1000, 65)
    right = {
        n: np.concatenate([session.run(None, {"x": x[i : min(n, i + 64)]})[0] for i in range(0, n, 64)]) for n in sizes
    }
    single = session.run(None, {"x": x[:1]})[0]
    with ServerProcess(tmp_path, "--transport", transport) as server:
        done = threading.Event()
        asked = Counter[str]()

        def bulk(client: int) -> None:
            caller, n = Caller(server), sizes[client]
            for _ in range(4):
                (y,) = caller.infer("chain", x[:n])
                assert np.array_equal(y, right[n])
            caller.close()

        def singles(client: int) -> None:
            caller = Caller(server)
            while not done.is_set() or asked[f"{client}"] < 20:
                (y,) = caller.infer("chain", x[:1])
                assert np.allclose(y, single, rtol=1e-5, atol=1e-6)
                asked[f"{client}"] += 1
            caller.close()

        with threads(2, singles):
            with threads(len(sizes), bulk):
                pass
            done.set()
        caller = Caller(server)
        until(caller.idle, "the end")
        assert caller.metric("forwardpass_requests_total", model="chain", code="OK") == 4 * len(sizes) + sum(
            asked.values()
        )
        assert caller.metric("forwardpass_requests_total", model="chain") == 4 * len(sizes) + sum(asked.values())
        assert caller.metric("forwardpass_rows_total", model="chain") == 4 * sum(sizes) + sum(asked.values())
        caller.close()


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_single_row_is_answered_between_the_turns_of_a_large_request(tmp_path: Path, transport: str) -> None:
    options = "max_batch_size = 4\ninstances = 1\nbatch_invariance = true\n"
    models.save(tmp_path, "hold", models.hold(), options)
    with ServerProcess(tmp_path, "--transport", transport) as server:
        caller, other = Caller(server), Caller(server)
        bulk = caller.start(request("hold", np.full((400, 1), 2e4, np.float32)), timeout=None)
        until(lambda: caller.metric("forwardpass_queue_rows", model="hold") > 0, "the turns")
        for _ in range(3):
            assert other.infer("hold", np.array([[5.0]], np.float32))[0].tolist() == [[5.0]]
        assert not bulk.done(), "the single rows waited for all of its turns"
        assert outputs(bulk.result())[0].shape == (400, 1)
        caller.close()
        other.close()


def test_a_client_that_leaves_takes_the_rest_of_its_rows_along(tmp_path: Path) -> None:
    options = "max_batch_size = 4\ninstances = 1\nbatch_invariance = true\n"
    models.save(tmp_path, "hold", models.hold(), options)
    with ServerProcess(tmp_path) as server:
        caller = Caller(server)
        bulk = caller.start(request("hold", np.full((400, 1), 1e5, np.float32)), timeout=None)
        until(lambda: 0 < caller.metric("forwardpass_queue_rows", model="hold") < 396, "the turns")
        bulk.cancel()
        until(caller.idle, "the end")
        assert caller.metric("forwardpass_refused_total", model="hold", reason="cancelled") == 1
        assert caller.metric("forwardpass_rows_total", model="hold") < 400
        assert caller.infer("hold", np.array([[5.0]], np.float32))[0].tolist() == [[5.0]]
        caller.close()
